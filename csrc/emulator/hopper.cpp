#include "emulator/hopper.h"

#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/simt.h"

namespace microtome::simt {
namespace {

constexpr uint32_t kWindow = 1024;  // where dynamic shared memory begins
constexpr int kWarpgroup = 128;

[[noreturn]] void undefined(const std::string& what) { throw std::runtime_error("emulator: " + what); }

// "Contents of the mbarrier object". `none` is 0 in an object and 1 in shared memory as it starts out.
struct Barrier {
    uint64_t pending : 20, expected : 20, phase : 1, seen : 1, none : 1;
    int64_t bytes : 21;
};
static_assert(sizeof(Barrier) == 8);

Barrier load(const uint64_t* at) {
    if (reinterpret_cast<uintptr_t>(at) % 8) undefined("an mbarrier object is 8-byte aligned");
    Barrier barrier;
    std::memcpy(&barrier, at, 8);
    if (barrier.none) undefined("an mbarrier is used before mbarrier.init");
    return barrier;
}

// "Phase Completion of the mbarrier object".
void store(uint64_t* at, Barrier barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.phase ^= 1;
        barrier.seen = 0;
        barrier.pending = barrier.expected;
    }
    std::memcpy(at, &barrier, 8);
}

void arrive(uint64_t* at, uint32_t bytes) {
    Barrier barrier = load(at);
    // "Phase of the mbarrier object": each phase is waited for before anything arrives in the next.
    if (!barrier.seen) undefined("an arrival at an mbarrier whose last phase nobody waited for");
    if (barrier.pending == 0) undefined("more arrivals at an mbarrier than it expects");
    barrier.bytes += bytes;
    --barrier.pending;
    store(at, barrier);
}

// Products accumulated in one set of registers that no wait has given back yet.
struct Accumulator {
    int n;
    std::vector<float> d;            // [64, n]
    float* registers[kWarpgroup]{};  // null: the thread holds them
    size_t last[kWarpgroup]{};       // the thread's latest product with them, counted from 1
};

struct Product {
    uint64_t a, b;
    int n, threads = 0;
    bool accumulate;
    std::shared_ptr<Accumulator> into;
};

struct Warpgroup {
    std::vector<Product> products;  // in the order of issue
    size_t done = 0;
    std::vector<std::shared_ptr<Accumulator>> live;
    size_t issued[kWarpgroup]{};
    std::vector<size_t> groups[kWarpgroup];  // products issued at each commit
    bool fenced[kWarpgroup]{};
    int registers = 0, moving = 0;
};

struct State {
    uint64_t serial = 0;
    bool fenced = true;  // no barrier was initialised since the last fence
    int free_registers = 0;
    std::map<unsigned, Warpgroup> warpgroups;
};

State& state() {
    thread_local State s;
    if (s.serial != block_serial()) {
        s = State{};
        s.serial = block_serial();
    }
    return s;
}

unsigned thread_in_block() { return warp() * 32 + lane(); }
Warpgroup& warpgroup() { return state().warpgroups[thread_in_block() / kWarpgroup]; }
unsigned thread_in_group() { return thread_in_block() % kWarpgroup; }

uint64_t swizzled(uint64_t address, uint32_t bits, uint64_t base_offset) {
    return address ^ ((((address >> 7) - base_offset) & ((1u << bits) - 1)) << 4);
}

// "Shared Memory Matrix Layout", K-major, bf16: T = 8 elements of 16 bytes. Rows of 2^bits * 16 bytes, eight of them
// an atom, the next eight at the stride byte offset; without swizzle the second 8 columns lie at the leading one.
struct Matrix {
    uint64_t start, leading, stride, base_offset;
    uint32_t bits;

    explicit Matrix(uint64_t descriptor)  // "Matrix Descriptor Format"
        : start((descriptor & 0x3FFF) << 4),
          leading((descriptor >> 16 & 0x3FFF) << 4),
          stride((descriptor >> 32 & 0x3FFF) << 4),
          base_offset(descriptor >> 49 & 7) {
        const uint32_t mode = descriptor >> 62;  // 1: 128 bytes, 2: 64, 3: 32
        bits = mode ? 4 - mode : 0;
    }

    float operator()(int row, int k) const {
        const uint64_t within = bits ? static_cast<uint64_t>(k) * 2 : (k / 8) * leading + (k % 8) * 2;
        const uint64_t linear = start + (row / 8) * stride + (row % 8) * (uint64_t{16} << bits) + within;
        const uint64_t address = swizzled(linear, bits, base_offset);
        if (address < kWindow || address + 2 > kWindow + dynamic_shared_bytes()) {
            undefined("wgmma reads outside shared memory");
        }
        uint16_t element;
        std::memcpy(&element, dynamic_shared() + (address - kWindow), 2);
        return from_bits<float>(static_cast<uint64_t>(element) << 16);
    }
};

void multiply(const Product& product) {
    const Matrix a(product.a), b(product.b);
    const int n = product.n;
    float columns[16][256];
    for (int j = 0; j < n; ++j) {
        for (int k = 0; k < 16; ++k) columns[k][j] = b(j, k);
    }
    for (int i = 0; i < 64; ++i) {
        float* d = product.into->d.data() + i * n;
        if (!product.accumulate) std::fill(d, d + n, 0.0f);
        for (int k = 0; k < 16; ++k) {
            const float factor = a(i, k);
            for (int j = 0; j < n; ++j) d[j] += factor * columns[k][j];
        }
    }
}

// "Matrix Fragments for wgmma.mma_async.m64nNk16", accumulator D: where register i of a thread lies in [64, n].
int place(unsigned thread, int i, int n) {
    const int row = 16 * static_cast<int>(thread / 32) + static_cast<int>(thread % 32) / 4 + i / 2 % 2 * 8;
    return row * n + i / 4 * 8 + static_cast<int>(thread % 4) * 2 + i % 2;
}

}  // namespace

TensorMap encode_tensor_map(const void* address, uint64_t columns, uint64_t rows, uint64_t row_bytes,
                            uint32_t box_columns, uint32_t box_rows, Swizzle swizzle) {
    const auto refuse = [](const char* what) { undefined(std::string("cuTensorMapEncodeTiled: ") + what); };
    const uint32_t inner = box_columns * 2;
    if (reinterpret_cast<uintptr_t>(address) % 16) refuse("globalAddress must be 16-byte aligned");
    if (columns == 0 || rows == 0 || columns > uint64_t{1} << 32 || rows > uint64_t{1} << 32) {
        refuse("globalDim must lie in [1, 2^32]");
    }
    if (row_bytes < columns * 2) refuse("globalStrides must not be below the size of a row");
    if (row_bytes % 16 || row_bytes >= uint64_t{1} << 40) refuse("globalStrides: multiples of 16 below 2^40");
    if (box_columns == 0 || box_columns > 256 || box_rows == 0 || box_rows > 256) refuse("boxDim: 1 to 256");
    if (inner % 16) refuse("the box's rows must be multiples of 16 bytes");
    if (swizzle != Swizzle::kNone && inner > 16u << static_cast<uint32_t>(swizzle)) {
        refuse("the box's rows must not be longer than the swizzle");
    }
    return {static_cast<const unsigned char*>(address), columns, rows, row_bytes, box_columns, box_rows, swizzle};
}

uint32_t shared_address(const void* at) {
    const auto offset = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(dynamic_shared());
    if (offset >= dynamic_shared_bytes()) undefined("an address outside dynamic shared memory");
    return kWindow + static_cast<uint32_t>(offset);
}

void mbarrier_init(uint64_t* at, uint32_t arrivals) {
    shared_address(at);
    if (arrivals == 0 || arrivals >= 1u << 20) undefined("mbarrier.init: the count must lie in [1, 2^20)");
    Barrier barrier{};
    barrier.pending = barrier.expected = arrivals;
    barrier.seen = 1;
    std::memcpy(at, &barrier, 8);
    state().fenced = false;
}

void mbarrier_arrive(uint64_t* at) { arrive(at, 0); }
void mbarrier_arrive_expect_tx(uint64_t* at, uint32_t bytes) {
    if (bytes >= 1u << 20) undefined("expect-tx: the count must be below 2^20");
    arrive(at, bytes);
}

void mbarrier_wait(uint64_t* at, uint32_t parity) {
    load(at);
    // mbarrier.try_wait.parity: of the current phase, incomplete, or of the one before, complete.
    const std::function<bool()> ready = [at, parity] { return load(at).phase != (parity & 1); };
    wait_until(ready, "mbarrier.try_wait");
    Barrier barrier = load(at);
    barrier.seen = 1;
    std::memcpy(at, &barrier, 8);
}

void fence_barrier_init() { state().fenced = true; }

void tensor_copy(void* to, const TensorMap& map, int32_t column, int32_t row, uint64_t* at) {
    const uint64_t inner = map.box_columns * 2;
    const uint32_t bits = static_cast<uint32_t>(map.swizzle);
    const uint64_t total = inner * map.box_rows;
    const uint32_t start = shared_address(to);
    if (start % (bits ? 128u << bits : 128u)) undefined("a tensor copy's address must be a multiple of the pattern's");
    if (start - kWindow + total > dynamic_shared_bytes()) undefined("a tensor copy past the end of shared memory");
    if (!state().fenced) undefined("a tensor copy before the mbarrier's initialisation was fenced");
    load(at);
    later([=] {
        for (uint64_t r = 0; r < map.box_rows; ++r) {
            for (uint64_t c = 0; c < map.box_columns; ++c) {
                const int64_t from_row = row + static_cast<int64_t>(r), from_column = column + static_cast<int64_t>(c);
                uint16_t element = 0;
                if (from_row >= 0 && from_column >= 0 && static_cast<uint64_t>(from_row) < map.rows &&
                    static_cast<uint64_t>(from_column) < map.columns) {
                    std::memcpy(&element, map.address + from_row * map.row_bytes + from_column * 2, 2);
                }
                const uint64_t address = swizzled(start + r * inner + c * 2, bits, 0);
                std::memcpy(dynamic_shared() + (address - kWindow), &element, 2);
            }
        }
        Barrier barrier = load(at);  // complete-tx: zeros out of bounds count as well
        barrier.bytes -= static_cast<int64_t>(total);
        store(at, barrier);
    });
}

void wgmma_fence() { warpgroup().fenced[thread_in_group()] = true; }

void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate) {
    if (n < 8 || n > 256 || n % 8) undefined("wgmma: n must be a multiple of 8 up to 256");
    Warpgroup& group = warpgroup();
    const unsigned thread = thread_in_group();
    if (group.issued[thread] == group.products.size()) {
        Product product{a, b, n, 0, accumulate, nullptr};
        for (const auto& live : group.live) {
            if (live->registers[thread] == d) product.into = live;
        }
        if (!product.into) {
            product.into = std::make_shared<Accumulator>();
            product.into->n = n;
            product.into->d.resize(static_cast<size_t>(64) * n);
            group.live.push_back(product.into);
        }
        group.products.push_back(product);
    }
    Product& product = group.products[group.issued[thread]];
    if (product.a != a || product.b != b || product.n != n || product.accumulate != accumulate) {
        undefined("wgmma: the threads of a warpgroup differ in n, in a descriptor or in scale-d");
    }
    Accumulator& into = *product.into;
    if (into.n != n) undefined("wgmma: registers in flight of another shape");
    if (!into.registers[thread]) {
        if (!group.fenced[thread]) undefined("wgmma on registers that no wgmma.fence ordered");
        for (int i = 0; i < n / 2; ++i) {
            into.d[place(thread, i, n)] = d[i];
            d[i] = std::numeric_limits<float>::quiet_NaN();
        }
        into.registers[thread] = d;
    }
    if (into.registers[thread] != d) undefined("wgmma: the threads of a warpgroup differ in their registers");
    into.last[thread] = ++group.issued[thread];
    if (++product.threads == kWarpgroup) {
        later([&group] { multiply(group.products[group.done++]); });  // in order, whichever comes first
    }
}

void wgmma_commit_group() {
    Warpgroup& group = warpgroup();
    group.groups[thread_in_group()].push_back(group.issued[thread_in_group()]);
}

void wgmma_wait_group(int pending) {
    Warpgroup& group = warpgroup();
    const unsigned thread = thread_in_group();
    const std::vector<size_t>& groups = group.groups[thread];
    if (groups.size() <= static_cast<size_t>(pending)) return;
    const size_t target = groups[groups.size() - 1 - static_cast<size_t>(pending)];
    const std::function<bool()> ready = [&group, target] { return group.done >= target; };
    wait_until(ready, "wgmma.wait_group");
    for (size_t i = 0; i < group.live.size();) {
        Accumulator& live = *group.live[i];
        if (live.registers[thread] && live.last[thread] <= target) {
            for (int r = 0; r < live.n / 2; ++r) live.registers[thread][r] = live.d[place(thread, r, live.n)];
            live.registers[thread] = nullptr;
            group.fenced[thread] = false;
        }
        bool held = false;
        for (const float* registers : live.registers) held = held || registers;
        if (held) {
            ++i;
        } else {
            group.live.erase(group.live.begin() + static_cast<std::ptrdiff_t>(i));
        }
    }
}

void set_max_registers(int registers) {
    if (registers < 24 || registers > 256 || registers % 8) undefined("setmaxnreg: a multiple of 8 in [24, 256]");
    State& s = state();
    Warpgroup& group = warpgroup();
    const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    if (group.registers == 0) group.registers = 65536 / threads / 8 * 8;  // one block a multiprocessor
    const int more = (registers - group.registers) * 32;                  // by warp, each for itself
    const std::function<bool()> ready = [&s, more] { return s.free_registers >= more; };
    exchange(0xFFFFFFFFu, static_cast<uint64_t>(registers), "setmaxnreg");
    if (lane() == 0) {
        wait_until(ready, "setmaxnreg");
        s.free_registers -= more;
        if (++group.moving == kWarpgroup / 32) {
            group.registers = registers;
            group.moving = 0;
        }
    }
    exchange(0xFFFFFFFFu, static_cast<uint64_t>(registers), "setmaxnreg");
}

bool elect_one() {
    exchange(0xFFFFFFFFu, 0, "elect.sync");
    return lane() == block_serial() % 32;  // which lane is not said
}

}  // namespace microtome::simt
