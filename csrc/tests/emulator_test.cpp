// What the emulator promises of CUDA's execution model, seen through small kernels.
#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "cuda/copy.cuh"
#include "cuda/device.cuh"

namespace microtome::test {
namespace {

using cuda::Geometry;
using cuda::launch;
using simt::Order;

char array_key;
constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kShuffled};

// Run `body` for every thread of one block and return what it wrote, or the error's text in `error`.
template <class Body>
std::vector<int> run(int threads, Order order, Body body, std::string* error = nullptr, size_t shared = 1 << 12) {
    std::vector<int> out(static_cast<size_t>(threads), -1);
    simt::set_order(order, 7);
    try {
        simt::run(dim3(1), dim3(static_cast<unsigned>(threads)), shared, [&] { body(out.data()); });
    } catch (const std::exception& failed) {
        if (error == nullptr) throw;
        *error = failed.what();
    }
    simt::set_order(Order::kForward, 0);
    return out;
}

int me() { return static_cast<int>(threadIdx.x); }

__global__ void reversed(const int* in, int* out, bool wait) {
    MICROTOME_SHARED(int, box, 64);
    box[threadIdx.x] = in[threadIdx.x];
    if (wait) __syncthreads();
    out[threadIdx.x] = box[blockDim.x - 1 - threadIdx.x];
}

std::vector<int> reverse_of_64(bool wait, Order order) {
    std::vector<int> in(64), out(64);
    for (int i = 0; i < 64; ++i) in[static_cast<size_t>(i)] = i;
    simt::set_order(order, 3);
    launch("reversed", reversed, Geometry{dim3(1), dim3(64)}, in.data(), out.data(), wait);
    simt::set_order(Order::kForward, 0);
    return out;
}

}  // namespace

void a_barrier_lets_every_thread_see_what_all_wrote() {
    for (Order order : kOrders) {
        const auto out = reverse_of_64(true, order);
        for (int i = 0; i < 64; ++i) CHECK(out[static_cast<size_t>(i)] == 63 - i);
    }
}

void a_missing_barrier_gives_another_answer_under_another_order() {
    CHECK(reverse_of_64(false, Order::kForward) != reverse_of_64(false, Order::kReverse));
    CHECK(reverse_of_64(false, Order::kForward) != reverse_of_64(true, Order::kForward));
}

void a_named_barrier_waits_for_its_own_threads_only() {
    for (Order order : kOrders) {
        // Warps 0 and 1 meet twice at barrier 1; warp 2 only arrives at barrier 2, where warp 3 waits.
        const auto out = run(128, order, [](int* result) {
            MICROTOME_DYNAMIC_SHARED(int, box);
            const int warp = me() / 32;
            if (warp == 2) {
                box[me()] = me();
                simt::barrier_arrive(2, 64);
                return;
            }
            if (warp == 3) {
                simt::barrier(2, 64);
                result[me()] = box[me() - 32];
                return;
            }
            box[me()] = me();
            simt::barrier(1, 64);
            const int theirs = box[me() ^ 32];
            simt::barrier(1, 64);
            box[me()] = -5;
            result[me()] = theirs;
        });
        for (int i = 0; i < 128; ++i) {
            const int expected = i < 64 ? i ^ 32 : i < 96 ? -1 : i - 32;
            CHECK(out[static_cast<size_t>(i)] == expected);
        }
    }
}

void lanes_exchange_within_their_mask() {
    for (Order order : kOrders) {
        const auto out = run(64, order, [](int* result) {
            const int lane = me() % 32;
            if (lane < 8) {
                result[me()] = __shfl_xor_sync(0xFFu, lane, 3);
            } else if (lane < 24) {
                result[me()] = static_cast<int>(__ballot_sync(0x00FFFF00u, lane % 2));
            } else {
                result[me()] = __shfl_up_sync(0xFF000000u, lane, 1, 8);
            }
            // All meet again: lane i gets what lane i + 16 brought, and of each eight the sixth's.
            const int far = __shfl_down_sync(0xFFFFFFFFu, lane, 16), sixth = __shfl_sync(0xFFFFFFFFu, lane, 5, 8);
            if (far != (lane < 16 ? lane + 16 : lane) || sixth != lane / 8 * 8 + 5) result[me()] = -2;
        });
        for (int i = 0; i < 64; ++i) {
            const int lane = i % 32;
            const int expected = lane < 8 ? lane ^ 3 : lane < 24 ? 0x00AAAA00 : std::max(lane - 1, 24);
            CHECK(out[static_cast<size_t>(i)] == expected);
        }
    }
}

void a_lane_outside_its_mask_is_named() {
    std::string error;
    run(32, Order::kForward, [](int*) { __syncwarp(0xFFFFu); }, &error);
    CHECK(error == "emulator: a lane outside the mask calls __syncwarp");
    run(32, Order::kForward, [](int*) { me() ? __syncwarp() : static_cast<void>(__any_sync(0xFFFFFFFFu, 1)); }, &error);
    CHECK(error.find("emulator: lanes of one warp meet in") == 0);
}

void a_block_that_cannot_go_on_is_an_error() {
    for (Order order : kOrders) {
        std::string error;
        run(
            64, order,
            [](int*) {
                if (me() < 32) {
                    simt::barrier(1, 64);
                } else {
                    __syncwarp(0xFFFFFFFFu);
                    if (me() > 40) __shfl_sync(0xFFFFFFFFu, 1, 0);
                }
            },
            &error);
        CHECK(error == "emulator: a block cannot go on; 23 threads wait in __shfl_sync; 32 threads wait in barrier 1;");
    }
}

void threads_that_returned_are_not_waited_for() {
    for (Order order : kOrders) {
        const auto out = run(96, order, [](int* result) {
            MICROTOME_DYNAMIC_SHARED(int, box);
            if (me() >= 40) return;
            box[me()] = 2 * me();
            __syncthreads();
            result[me()] = box[39 - me()];
        });
        for (int i = 0; i < 96; ++i) CHECK(out[static_cast<size_t>(i)] == (i < 40 ? 2 * (39 - i) : -1));
    }
}

void shared_memory_starts_as_nan_in_every_block() {
    int nan = 0, aligned = 0;
    for (int launches = 0; launches < 2; ++launches) {
        simt::run(dim3(3), dim3(32), 256, [&] {
            MICROTOME_DYNAMIC_SHARED(float, open);
            MICROTOME_SHARED(double, fixed, 32);
            nan += std::isnan(open[me()]) && std::isnan(fixed[me()]);
            aligned += reinterpret_cast<uintptr_t>(open) % 1024 == 0;
            open[me()] = 0.0f;
            fixed[me()] = 0.0;
        });
    }
    CHECK(nan == 2 * 3 * 32);
    CHECK(aligned == 2 * 3 * 32);
}

void atomics_lose_nothing_and_come_in_any_order() {
    std::vector<int> first, other;
    for (Order order : {Order::kForward, Order::kReverse}) {
        int total = 0;
        auto& places = order == Order::kForward ? first : other;
        places = run(128, order, [&](int* result) { result[me()] = atomicAdd(&total, 1); });
        CHECK(total == 128);
        auto sorted = places;
        std::sort(sorted.begin(), sorted.end());
        for (int i = 0; i < 128; ++i) CHECK(sorted[static_cast<size_t>(i)] == i);
    }
    CHECK(first != other);
}

void a_copy_is_not_seen_before_its_group_is_waited_for() {
    int from[64];
    for (int i = 0; i < 64; ++i) from[i] = i;
    const auto out = run(32, Order::kForward, [&](int* result) {
        MICROTOME_DYNAMIC_SHARED(int, box);
        box[me()] = box[32 + me()] = -1;
        cuda::copy_async<4>(box + me(), from + me());
        cuda::commit_async();
        cuda::copy_async<4>(box + 32 + me(), from + 32 + me());
        cuda::commit_async();
        const int before = box[me()];
        cuda::wait_async<1>();
        const int first = box[me()], second = box[32 + me()];
        cuda::wait_async<0>();
        result[me()] = before == -1 && first == me() && second == -1 && box[32 + me()] == 32 + me();
    });
    CHECK(std::count(out.begin(), out.end(), 1) == 32);
}

void an_exception_in_a_kernel_reaches_the_host() {
    std::string error;
    run(
        32, Order::kForward,
        [](int*) {
            if (me() == 5) throw std::runtime_error("from thread 5");
        },
        &error);
    CHECK(error == "from thread 5");
    run(33, Order::kForward, [](int*) { __syncthreads(); }, &error);  // and the emulator goes on
    CHECK(error == "from thread 5");
}

void a_geometry_that_no_gpu_has_is_refused() {
    std::string error;
    run(1025, Order::kForward, [](int*) {}, &error);
    CHECK(error == "emulator: a block has 1 to 1024 threads");
    for (const dim3 grid : {dim3(0x80000000u), dim3(1, 65536), dim3(1, 1, 65536)}) {
        error.clear();
        try {
            simt::run(grid, dim3(1), 0, [] {});
        } catch (const std::runtime_error& e) {
            error = e.what();
        }
        CHECK(error == "emulator: a grid has at most 2^31 - 1 blocks along x and 65535 along y and z");
    }
    run(32, Order::kForward, [](int*) {}, &error, 228 << 10);
    CHECK(error == "emulator: a block has at most 227 KiB of shared memory, not 233472 bytes");
    const auto array = [](int*) { simt::shared_array(&array_key, 1); };
    run(32, Order::kForward, array, &error, simt::kMostShared);
    CHECK(error == "emulator: a block has at most 227 KiB of shared memory, not 233472 bytes");
}

void blocks_beyond_the_limit_of_y_lie_along_x() {
    // Rows, and blocks for each: more than 65535 of either.
    for (const auto& [rows, across] : {std::pair<int64_t, int64_t>{3, 70000}, {70000, 3}, {1, 1}, {1 << 20, 2047}}) {
        const dim3 grid = cuda::along_x("op", rows, across);
        CHECK(grid.x == rows * across);
        CHECK(grid.y == 1 && grid.z == 1);
        for (int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
            for (int64_t part : {int64_t{0}, across / 2, across - 1}) {
                const auto place = cuda::place_in(static_cast<unsigned>(part * rows + row), rows);
                CHECK(place.row == row && place.across == part);
            }
        }
    }
    CHECK(cuda::slabs(0).empty());
    using Slabs = std::vector<std::pair<unsigned, unsigned>>;
    CHECK((cuda::slabs(65535) == Slabs{{0, 65535}}));
    CHECK((cuda::slabs(140000) == Slabs{{0, 65535}, {65535, 65535}, {131070, 8930}}));
    CHECK(cuda::along_x("op", 5, 0).x == 0);
    CHECK(cuda::along_x("op", 0, 5).x == 0);
    std::string error;
    try {
        cuda::along_x("op", 1 << 20, 2048);
    } catch (const std::runtime_error& e) {
        error = e.what();
    }
    CHECK(error == "op: a launch of 1048576 x 2048 blocks (a GPU takes 2^31 - 1). Use fewer rows at a time.");
}

}  // namespace microtome::test
