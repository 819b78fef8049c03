// The emulator's copies, barriers and products on numbers that can be checked by hand, and what it refuses. Kernels
// that pass on it prove no more than these twins are worth.
#include "tests/hopper_test.h"

#include <cmath>
#include <functional>
#include <string>

#include "emulator/hopper.h"
#include "emulator/simt.h"
#include "tests/check.h"

namespace microtome::test {
namespace {

using namespace microtome::simt;

constexpr uint32_t kBytes = 64 << 10;

// What the emulator says against a kernel of so many threads; "" if nothing.
std::string refusal(unsigned threads, const std::function<void()>& body) {
    try {
        run(dim3(1), dim3(threads), kBytes, body);
    } catch (const std::exception& error) {
        return error.what();
    }
    return "";
}

bool says(const std::string& message, const char* part) { return message.find(part) != std::string::npos; }

uint16_t bf16(float value) { return static_cast<uint16_t>(bits(value) >> 16); }

uint64_t* barrier_at(int i) { return reinterpret_cast<uint64_t*>(dynamic_shared() + kBytes - 64) + i; }
uint16_t* elements() { return reinterpret_cast<uint16_t*>(dynamic_shared()); }

uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride, uint64_t mode) {
    return uint64_t{start >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 | mode << 62;
}

void init(uint64_t* barrier, uint32_t arrivals) {
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, arrivals);
        fence_barrier_init();
    }
    __syncthreads();
}

// a [64, 16] and b [n, 16] without swizzle: 8 x 8 core matrices of 128 bytes, the next 8 columns at 128, the next 8
// rows at 256.
void place_unswizzled(uint16_t* to, int rows, const std::function<float(int, int)>& value) {
    for (int r = 0; r < rows; ++r) {
        for (int k = 0; k < 16; ++k) to[r / 8 * 128 + k / 8 * 64 + r % 8 * 8 + k % 8] = bf16(value(r, k));
    }
}

float left(int row, int k) { return static_cast<float>(row - 20 + 3 * k); }
float right(int column, int k) { return static_cast<float>(column % 16 == k) * (column < 16 ? 1.0f : 2.0f); }
// sum over k of left * right: one term.
float product(int row, int column) { return left(row, column % 16) * (column < 16 ? 1.0f : 2.0f); }

}  // namespace

void a_barrier_waits_for_threads_and_for_bytes() {
    int order = 0, arrived = 0, passed = 0;
    run(dim3(1), dim3(3), kBytes, [&] {
        init(barrier_at(0), 2);
        if (threadIdx.x == 0) {
            mbarrier_wait(barrier_at(0), 1);  // the phase before the first counts as complete
            mbarrier_wait(barrier_at(0), 0);
            passed = ++order;
        } else {
            for (unsigned i = 0; i < 5 * threadIdx.x; ++i) yield();
            arrived = ++order;
            mbarrier_arrive(barrier_at(0));
        }
    });
    CHECK(arrived == 2 && passed == 3);

    alignas(16) uint16_t source[64] = {};
    const TensorMap map = encode_tensor_map(source, 64, 1, 128, 64, 1, Swizzle::kNone);
    CHECK(says(refusal(2,
                       [&] {
                           init(barrier_at(0), 1);
                           if (threadIdx.x == 0) {
                               mbarrier_arrive_expect_tx(barrier_at(0), 128 + 2);  // two bytes never come
                               tensor_copy(elements(), map, 0, 0, barrier_at(0));
                           }
                           mbarrier_wait(barrier_at(0), 0);
                       }),
               "2 threads wait in mbarrier.try_wait"));
    CHECK(says(refusal(1, [] { mbarrier_wait(barrier_at(0), 0); }), "before mbarrier.init"));
    CHECK(says(refusal(1,
                       [] {
                           init(barrier_at(0), 1);
                           mbarrier_arrive(barrier_at(0));
                           mbarrier_arrive(barrier_at(0));
                       }),
               "nobody waited for"));
}

void a_tensor_copy_swizzles_and_fills_with_zeros() {
    // 12 rows of 70 columns, row r column c holding 100 r + c, in rows of 160 bytes.
    alignas(16) static uint16_t source[12 * 80];
    for (int r = 0; r < 12; ++r) {
        for (int c = 0; c < 80; ++c) source[r * 80 + c] = static_cast<uint16_t>(c < 70 ? 100 * r + c : 9999);
    }
    const TensorMap map = encode_tensor_map(source, 70, 12, 160, 64, 16, Swizzle::k128);
    std::vector<uint16_t> got(16 * 64);
    run(dim3(1), dim3(2), kBytes, [&] {
        init(barrier_at(0), 1);
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect_tx(barrier_at(0), 16 * 128);
            tensor_copy(dynamic_shared() + 2048, map, 8, 4, barrier_at(0));
            CHECK(elements()[1024] == 0xFFFF);  // not yet
        }
        mbarrier_wait(barrier_at(0), 0);
        if (threadIdx.x == 1) std::memcpy(got.data(), dynamic_shared() + 2048, 2048);
    });
    for (int r = 0; r < 16; ++r) {
        for (int c = 0; c < 64; ++c) {
            // 16-byte piece p of row r lies where piece p ^ (r mod 8) would without swizzle.
            const int at = r * 64 + (c / 8 ^ r % 8) * 8 + c % 8;
            CHECK(got[at] == (r < 8 && c < 62 ? 100 * (r + 4) + c + 8 : 0));
        }
    }
    const auto copy = [&](size_t offset, bool fenced) {
        return refusal(1, [&map, offset, fenced] {
            mbarrier_init(barrier_at(0), 1);
            if (fenced) fence_barrier_init();
            tensor_copy(dynamic_shared() + offset, map, 0, 0, barrier_at(0));
        });
    };
    CHECK(says(copy(512, true), "multiple of the pattern's"));
    CHECK(says(copy(0, false), "before the mbarrier's initialisation was fenced"));
    CHECK(says(copy(kBytes - 1024, true), "past the end of shared memory"));
    const auto map_of = [](uintptr_t address, uint64_t row_bytes, uint32_t box) {
        return refusal(1, [=] {
            encode_tensor_map(reinterpret_cast<const void*>(address), 8, 8, row_bytes, box, 8, Swizzle::k128);
        });
    };
    CHECK(says(map_of(8, 16, 8), "16-byte aligned") && says(map_of(16, 24, 8), "multiples of 16 below 2^40"));
    CHECK(says(map_of(16, 16, 128), "longer than the swizzle") && says(map_of(16, 16, 4), "multiples of 16 bytes"));
}

void a_product_reads_through_its_descriptors() {
    std::vector<float> got(64 * 24);
    for (const Order order : {Order::kForward, Order::kReverse, Order::kShuffled}) {
        set_order(order, 1);
        run(dim3(1), dim3(128), kBytes, [&] {
            if (threadIdx.x == 0) {
                place_unswizzled(elements(), 64, left);
                place_unswizzled(elements() + 1024, 24, right);
            }
            __syncthreads();
            float d[12];
            wgmma_fence();
            wgmma(d, 24, descriptor(shared_address(elements()), 128, 256, 0),
                  descriptor(shared_address(elements() + 1024), 128, 256, 0), false);
            wgmma_commit_group();
            CHECK(std::isnan(d[0]));  // in flight
            wgmma_wait_group(0);
            const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
            for (int i = 0; i < 12; ++i) {
                // Thread 4 r + q of a warp holds columns 2 q, 2 q + 1 of rows r and r + 8, then the next 8 columns.
                const int row = warp * 16 + lane / 4 + (i % 4 >= 2) * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                got[static_cast<size_t>(row * 24 + column)] = d[i];
            }
        });
        for (int i = 0; i < 64 * 24; ++i) CHECK(got[static_cast<size_t>(i)] == product(i / 24, i % 24));
    }
    set_order(Order::kForward, 0);
}

void a_product_undoes_every_swizzle() {
    for (uint64_t mode = 1; mode <= 3; ++mode) {  // 128, 64, 32 bytes
        const int row_bytes = 256 >> mode, steps = row_bytes / 32;
        float got = 0.0f;
        for (int step = 0; step < steps; ++step) {
            run(dim3(1), dim3(128), kBytes, [&] {
                unsigned char* a = dynamic_shared();
                unsigned char* b = a + 16384;
                // The 16-byte piece p of row r of an atom: 128-byte rows XOR r; 64-byte rows XOR r / 2; 32 XOR r / 4.
                const auto piece = [&](int r, int k) { return (k / 8 ^ r % 8 >> (mode - 1)) * 16 + k % 8 * 2; };
                for (int i = static_cast<int>(threadIdx.x); i < 64 * row_bytes / 2; i += 128) {
                    const int r = i / (row_bytes / 2), k = i % (row_bytes / 2);
                    const bool here = k / 16 == step;  // other columns must not be read
                    const float nan = std::nanf("");
                    const uint16_t in_a = bf16(here ? left(r, k % 16) : nan),
                                   in_b = bf16(here ? right(r, k % 16) : nan);
                    std::memcpy(a + r * row_bytes + piece(r, k), &in_a, 2);
                    if (r < 16) std::memcpy(b + r / 8 * 2048 + r % 8 * row_bytes + piece(r, k), &in_b, 2);
                }
                __syncthreads();
                float d[8];
                wgmma_fence();
                const uint32_t step_bytes = static_cast<uint32_t>(step) * 32;
                wgmma(d, 16, descriptor(shared_address(a) + step_bytes, 16, 8 * row_bytes, mode),
                      descriptor(shared_address(b) + step_bytes, 16, 2048, mode), false);
                wgmma_commit_group();
                wgmma_wait_group(0);
                if (threadIdx.x == 77) got = d[7];  // warp 2, lane 13: row 32 + 3 + 8, column 8 + 2 + 1
            });
            CHECK(got == product(43, 11));
        }
    }
}

void products_accumulate_and_must_be_fenced_and_waited_for() {
    float sum = 0.0f, first = 0.0f, second = 0.0f;
    const auto operand = [](int i) { return descriptor(shared_address(elements() + i), 128, 256, 0); };
    run(dim3(1), dim3(128), kBytes, [&] {
        if (threadIdx.x == 0) {
            place_unswizzled(elements(), 64, left);
            place_unswizzled(elements() + 1024, 8, right);
        }
        __syncthreads();
        float d[4] = {0.5f, 0.5f, 0.5f, 0.5f}, e[4] = {};
        wgmma_fence();
        wgmma(d, 8, operand(0), operand(1024), true);
        wgmma(d, 8, operand(0), operand(1024), true);
        wgmma_commit_group();
        wgmma(e, 8, operand(0), operand(1024), false);
        wgmma_commit_group();
        wgmma_wait_group(1);
        if (threadIdx.x == 0) {
            sum = d[0];
            first = e[0];
        }
        wgmma_wait_group(0);
        if (threadIdx.x == 0) second = e[0];
    });
    CHECK(sum == 0.5f + 2 * product(0, 0));
    CHECK(std::isnan(first) && second == product(0, 0));

    // Shared memory that nothing filled is NaN, and so is what is computed from it.
    run(dim3(1), dim3(128), kBytes, [&] {
        float d[4];
        wgmma_fence();
        wgmma(d, 8, operand(0), operand(1024), false);
        wgmma_commit_group();
        wgmma_wait_group(0);
        if (threadIdx.x == 5) first = d[3];
    });
    CHECK(std::isnan(first));
    CHECK(says(refusal(128,
                       [&] {
                           float d[4];
                           wgmma(d, 8, operand(0), operand(1024), false);
                       }),
               "no wgmma.fence"));
    CHECK(says(refusal(128,
                       [&] {
                           float d[4];
                           wgmma_fence();
                           wgmma(d, 8, operand(threadIdx.x / 32 * 8), operand(1024), false);
                       }),
               "differ in n, in a descriptor"));
    CHECK(says(refusal(128,
                       [&] {
                           float d[4];
                           wgmma_fence();
                           if (threadIdx.x < 96) wgmma(d, 8, operand(0), operand(1024), false);
                           wgmma_commit_group();
                           wgmma_wait_group(0);
                       }),
               "96 threads wait in wgmma.wait_group"));
}

void registers_move_between_warpgroups() {
    const auto moved = [](int consumers) {
        return refusal(384, [consumers] { set_max_registers(threadIdx.x < 128 ? 40 : consumers); });
    };
    CHECK(moved(232).empty());  // 384 threads start with 168 each: 40 + 2 * 232 = 3 * 168
    CHECK(says(moved(240), "wait in setmaxnreg"));
    CHECK(says(moved(230), "multiple of 8"));
    int elected = 0;
    run(dim3(1), dim3(64), 0, [&] { elected += elect_one(); });
    CHECK(elected == 2);
}

std::vector<std::string> run_hopper_tests() {
    std::vector<std::string> failed;
    const auto test = [&failed](const char* name, void (*run_it)()) {
        const int before = failures;
        run_it();
        if (failures != before) failed.push_back(name);
    };
#define RUN(name) test(#name, name);
    EACH_HOPPER_TEST(RUN)
#undef RUN
    return failed;
}

}  // namespace microtome::test
