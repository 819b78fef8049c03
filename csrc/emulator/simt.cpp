#include "emulator/simt.h"

#include <algorithm>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/fiber.h"

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace microtome::simt {
namespace {

constexpr size_t kBarriers = 16, kAlignment = 1024;
constexpr const char* kNames[kBarriers] = {
    "__syncthreads", "barrier 1", "barrier 2",  "barrier 3",  "barrier 4",  "barrier 5",  "barrier 6",  "barrier 7",
    "barrier 8",     "barrier 9", "barrier 10", "barrier 11", "barrier 12", "barrier 13", "barrier 14", "barrier 15"};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    int group;
};

struct Thread {
    Fiber* fiber = nullptr;
    uint3 at;
    const std::function<bool()>* ready = nullptr;  // null: it can run
    const char* waits_for = "";
    bool done = false;
    std::vector<Copy> copies;
    int groups = 0;  // committed
};

// Of the exact size, so that AddressSanitizer sees what goes past its end.
class Shared {
  public:
    void reset(size_t bytes) {
        if (!bytes_ || size_ != bytes) {
            bytes_.reset(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(kAlignment))));
            size_ = bytes;
        }
        std::fill_n(bytes_.get(), size_, static_cast<unsigned char>(0xFF));
    }
    unsigned char* data() const { return bytes_.get(); }
    size_t size() const { return size_; }

  private:
    struct Free {
        void operator()(unsigned char* at) const { ::operator delete(at, std::align_val_t(kAlignment)); }
    };
    std::unique_ptr<unsigned char, Free> bytes_;
    size_t size_ = 0;
};

struct Barrier {
    int arrived = 0;
    uint64_t phase = 0;
};

// One exchange of the lanes of a mask.
struct Meeting {
    uint32_t arrived = 0, left = 0;
    const char* what = "";
    Lanes lanes{};
};

struct Warp {
    Meeting whole;                         // of all 32 lanes
    std::map<uint32_t, Meeting> meetings;  // by mask
};

struct Block {
    std::vector<Thread> threads;
    std::vector<unsigned> turns;  // the order in which threads get their turn
    size_t current = 0;
    int alive = 0;
    Barrier barriers[kBarriers];
    std::vector<Warp> warps;
    std::vector<std::function<void()>> pending;
    Shared shared;
    std::map<const void*, Shared> arrays;    // shared ones, by what names them
    size_t own_shared = 0, most_shared = 0;  // bytes of those; of all shared memory at most
    const std::function<void()>* body = nullptr;
    std::string failure;
    std::mt19937_64 random;
};

thread_local Block* block = nullptr;
thread_local Order order = Order::kForward;
size_t most_there_is = kMostShared;
thread_local uint64_t seed = 0;
thread_local uint64_t serial = 0;

// Stacks live on between launches.
Fiber& stack_of(size_t thread) {
    thread_local std::vector<std::unique_ptr<Fiber>> stacks;
    while (stacks.size() <= thread) stacks.push_back(std::make_unique<Fiber>());
    return *stacks[thread];
}

Thread& self() { return block->threads[block->current]; }

void pause(const std::function<bool()>* ready, const char* what) {
    Thread& thread = self();
    thread.ready = ready;
    thread.waits_for = what;
    thread.fiber->suspend();
}

// Threads that returned no longer count, so what all the others wait for may have come.
void release(Barrier& barrier, int threads) {
    if (barrier.arrived > 0 && barrier.arrived >= (threads ? threads : block->alive)) {
        barrier.arrived = 0;
        ++barrier.phase;
    }
}

void enter() {
    Thread& thread = self();
    thread.fiber->arrive();
    try {
        (*block->body)();
    } catch (const std::exception& error) {
        block->failure = error.what();
    }
    thread.done = true;
    --block->alive;
    release(block->barriers[0], 0);
    thread.fiber->suspend(true);
}

void arrange(Block& b) {
    if (order == Order::kReverse) std::reverse(b.turns.begin(), b.turns.end());
    if (order == Order::kShuffled) std::shuffle(b.turns.begin(), b.turns.end(), b.random);
}

// The dynamic part begins at a multiple of 1024 bytes behind a kernel's own arrays.
void check_shared(size_t dynamic, size_t own, size_t most) {
    const size_t bytes = (own + 1023) / 1024 * 1024 + dynamic;
    if (bytes <= most) return;
    throw std::runtime_error("emulator: a block has at most " + std::to_string(most >> 10) + " KiB of shared memory" +
                             (most == kUnasked ? " unless it asks" : "") + ", not " + std::to_string(bytes) + " bytes");
}

[[noreturn]] void deadlock(const Block& b) {
    std::map<std::string, int> waiting;
    for (const Thread& thread : b.threads) {
        if (!thread.done) ++waiting[thread.waits_for];
    }
    std::string message = "emulator: a block cannot go on;";
    for (const auto& [what, threads] : waiting) {
        message += " " + std::to_string(threads) + " threads wait in " + what + ";";
    }
    throw std::runtime_error(message);
}

void run_block(Block& b) {
    while (b.alive > 0) {
        bool moved = false;
        if (order == Order::kShuffled) arrange(b);
        for (unsigned turn : b.turns) {
            Thread& thread = b.threads[turn];
            if (thread.done || (thread.ready && !(*thread.ready)())) continue;
            moved = true;
            thread.ready = nullptr;
            b.current = turn;
            threadIdx = thread.at;
            thread.fiber->resume();
            if (!b.failure.empty()) throw std::runtime_error(b.failure);
        }
        if (!b.pending.empty() && (!moved || b.random() % 4 == 0)) {
            const size_t which = order == Order::kForward ? 0 : b.random() % b.pending.size();
            std::function<void()> work = std::move(b.pending[which]);
            b.pending.erase(b.pending.begin() + static_cast<std::ptrdiff_t>(which));
            work();
            moved = true;
        }
        if (!moved) deadlock(b);
    }
    while (!b.pending.empty()) {
        b.pending.back()();
        b.pending.pop_back();
    }
}

}  // namespace

void set_order(Order new_order, uint64_t new_seed) {
    order = new_order;
    seed = new_seed;
}

size_t most_shared() { return most_there_is; }
void set_most_shared(size_t bytes) { most_there_is = bytes; }

void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body, size_t most) {
    const unsigned size = threads.x * threads.y * threads.z;
    if (size == 0 || size > 1024) throw std::runtime_error("emulator: a block has 1 to 1024 threads");
    if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
        throw std::runtime_error("emulator: a grid has at most 2^31 - 1 blocks along x and 65535 along y and z");
    }
    check_shared(shared_bytes, 0, most);
    Block b;
    b.most_shared = most;
    b.threads.resize(size);
    b.warps.resize((size + 31) / 32);
    b.turns.resize(size);
    b.random.seed(seed);
    b.body = &body;
    for (unsigned i = 0; i < size; ++i) {
        b.threads[i].fiber = &stack_of(i);
        b.threads[i].at = {i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)};
    }
    Block* outer = block;
    block = &b;
    gridDim = grid;
    blockDim = threads;
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    std::vector<uint64_t> sequence(blocks);
    for (uint64_t i = 0; i < blocks; ++i) sequence[i] = i;
    if (order == Order::kReverse) std::reverse(sequence.begin(), sequence.end());
    if (order == Order::kShuffled) std::shuffle(sequence.begin(), sequence.end(), b.random);
    try {
        for (uint64_t i : sequence) {
            blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                        static_cast<unsigned>(i / grid.x / grid.y)};
            b.alive = static_cast<int>(size);
            b.shared.reset(shared_bytes);
            ++serial;
            for (auto& [key, array] : b.arrays) array.reset(array.size());
            for (Warp& warp : b.warps) warp = {};
            for (Barrier& barrier : b.barriers) barrier = {};
            for (unsigned t = 0; t < size; ++t) {
                b.threads[t].done = false;
                b.threads[t].ready = nullptr;
                b.threads[t].copies.clear();
                b.threads[t].fiber->begin(enter);
                b.turns[t] = t;
            }
            arrange(b);
            run_block(b);
        }
    } catch (...) {
        block = outer;
        throw;
    }
    block = outer;
}

unsigned char* dynamic_shared() { return block->shared.data(); }
size_t dynamic_shared_bytes() { return block->shared.size(); }
uint64_t block_serial() { return serial; }

void* shared_array(const void* key, size_t bytes) {
    Shared& array = block->arrays[key];
    if (array.size() == 0) {
        array.reset(bytes);
        block->own_shared += bytes;
        check_shared(block->shared.size(), block->own_shared, block->most_shared);
    }
    return array.data();
}

void wait_until(const std::function<bool()>& ready, const char* what) {
    if (!ready()) pause(&ready, what);
}

void yield() { pause(nullptr, "yield"); }

void barrier(int id, int threads) {
    Barrier& b = block->barriers[id];
    const uint64_t phase = b.phase;
    ++b.arrived;
    release(b, threads);
    const std::function<bool()> passed = [&b, phase] { return b.phase != phase; };
    wait_until(passed, kNames[id]);
}

void barrier_arrive(int id, int threads) {
    ++block->barriers[id].arrived;
    release(block->barriers[id], threads);
}

Lanes exchange(uint32_t mask, uint64_t mine, const char* what) {
    const uint32_t me = 1u << lane();
    if (!(mask & me)) throw std::runtime_error(std::string("emulator: a lane outside the mask calls ") + what);
    Warp& mates = block->warps[warp()];
    Meeting& meeting = mask == 0xFFFFFFFFu ? mates.whole : mates.meetings[mask];
    const std::function<bool()> free = [&meeting, me] { return !(meeting.arrived & me); };
    wait_until(free, what);
    if (meeting.arrived == 0) meeting.what = what;
    if (std::strcmp(meeting.what, what) != 0) {
        throw std::runtime_error(std::string("emulator: lanes of one warp meet in ") + meeting.what + " and " + what);
    }
    meeting.arrived |= me;
    meeting.lanes.value[lane()] = mine;
    const std::function<bool()> complete = [&meeting, mask] { return (meeting.arrived & mask) == mask; };
    wait_until(complete, what);
    const Lanes out = meeting.lanes;
    meeting.left |= me;
    if (meeting.left == mask) meeting.arrived = meeting.left = 0;
    return out;
}

unsigned lane() { return static_cast<unsigned>(block->current) % 32; }
unsigned warp() { return static_cast<unsigned>(block->current) / 32; }

void copy_later(void* to, const void* from, size_t bytes) { self().copies.push_back({to, from, bytes, self().groups}); }

void commit_copies() { ++self().groups; }

void wait_copies(int groups_left) {
    Thread& thread = self();
    std::vector<Copy> left;
    for (const Copy& copy : thread.copies) {
        if (copy.group < thread.groups - groups_left) {
            std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
            left.push_back(copy);
        }
    }
    thread.copies = std::move(left);
}

void later(std::function<void()> work) { block->pending.push_back(std::move(work)); }

}  // namespace microtome::simt
