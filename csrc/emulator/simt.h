// CUDA's execution model on a CPU, for tests: blocks one after another, threads as fibers of one system thread.
//
// Kernels written in CUDA C++ are compiled by the host compiler against this header and run for real: barriers, warp
// exchanges and atomics have CUDA's meaning, and the order in which threads run is chosen by `Order`, so that a missing
// barrier gives another answer under another order. A barrier that not all threads reach is an error, not a hang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "emulator/vectors.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
// One block runs at a time, so its shared memory may be static; MICROTOME_SHARED also forgets it between blocks.
#define __shared__ static

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

namespace microtome::simt {

enum class Order { kForward, kReverse, kShuffled };

// What a block has at most: a kernel that did not ask for more, on a device of 9.0; or the device that tests play.
constexpr size_t kUnasked = 48 << 10, kMostShared = 227 << 10;
size_t most_shared();
void set_most_shared(size_t bytes);

// Run a kernel: `body` is called once per thread. Shared memory starts out as 0xFF bytes, a NaN in every format. A
// block that takes more than `most` of it, arrays of its own included, is an error.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, size_t most = most_shared());

// The order of threads and blocks of the launches to come; a seed for the shuffled one.
void set_order(Order order, uint64_t seed);

unsigned char* dynamic_shared();  // 1024-byte aligned
size_t dynamic_shared_bytes();
uint64_t block_serial();  // another number for every block that is run
// The block's array named by `key`, an address; like all shared memory it starts out as 0xFF bytes in every block.
void* shared_array(const void* key, size_t bytes);

// Let others run until `ready` holds. It is asked between turns and must not change anything.
void wait_until(const std::function<bool()>& ready, const char* what);
// Let others run once.
void yield();
// bar.sync: wait for `threads` threads of the block, 0 for all that have not returned. 16 barriers.
void barrier(int id, int threads);
void barrier_arrive(int id, int threads);
// What the lanes of `mask` bring, in lane order; the caller's lane must be one of them. `what` must agree.
struct Lanes {
    uint64_t value[32];
};
Lanes exchange(uint32_t mask, uint64_t mine, const char* what);
unsigned lane();  // of the warp
unsigned warp();  // of the block

// Work that completes later, at a time the scheduler picks before it would call the block deadlocked.
void later(std::function<void()> work);

// cp.async: the caller's copies are made when it waits for their group, and not seen before.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int groups_left);

template <class T>
uint64_t bits(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t out = 0;
    std::memcpy(&out, &value, sizeof(T));
    return out;
}

template <class T>
T from_bits(uint64_t value) {
    T out;
    std::memcpy(&out, &value, sizeof(T));
    return out;
}

}  // namespace microtome::simt

inline void __syncthreads() { microtome::simt::barrier(0, 0); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { microtome::simt::exchange(mask, 0, "__syncwarp"); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { microtome::simt::yield(); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    using namespace microtome::simt;
    const unsigned from = (lane() & ~(static_cast<unsigned>(width) - 1)) | (source & (width - 1));
    return from_bits<T>(exchange(mask, bits(value), "__shfl_sync").value[from]);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip, int width = 32) {
    using namespace microtome::simt;
    const unsigned from = lane() ^ static_cast<unsigned>(flip), first = lane() & ~(static_cast<unsigned>(width) - 1);
    const Lanes lanes = exchange(mask, bits(value), "__shfl_xor_sync");
    return from < first + static_cast<unsigned>(width) ? from_bits<T>(lanes.value[from]) : value;
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    using namespace microtome::simt;
    const unsigned within = lane() & (static_cast<unsigned>(width) - 1);
    const Lanes lanes = exchange(mask, bits(value), "__shfl_up_sync");
    return within >= delta ? from_bits<T>(lanes.value[lane() - delta]) : value;
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    using namespace microtome::simt;
    const unsigned within = lane() & (static_cast<unsigned>(width) - 1);
    const Lanes lanes = exchange(mask, bits(value), "__shfl_down_sync");
    return within + delta < static_cast<unsigned>(width) ? from_bits<T>(lanes.value[lane() + delta]) : value;
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    const auto lanes = microtome::simt::exchange(mask, predicate != 0, "__ballot_sync");
    uint32_t out = 0;
    for (int i = 0; i < 32; ++i) out |= (mask >> i & 1) && lanes.value[i] ? 1u << i : 0u;
    return out;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline uint32_t __activemask() { return 0xFFFFFFFFu; }

// Another thread may come between any two atomics.
template <class T>
T atomicAdd(T* at, T value) {
    microtome::simt::yield();
    const T old = *at;
    *at = old + value;
    return old;
}
template <class T>
T atomicMax(T* at, T value) {
    microtome::simt::yield();
    const T old = *at;
    if (value > old) *at = value;
    return old;
}
template <class T>
T atomicMin(T* at, T value) {
    microtome::simt::yield();
    const T old = *at;
    if (value < old) *at = value;
    return old;
}
template <class T>
T atomicOr(T* at, T value) {
    microtome::simt::yield();
    const T old = *at;
    *at = old | value;
    return old;
}
template <class T>
T atomicExch(T* at, T value) {
    microtome::simt::yield();
    const T old = *at;
    *at = value;
    return old;
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
    microtome::simt::yield();
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
T __ldg(const T* at) {
    return *at;
}
template <class T>
T __ldcs(const T* at) {
    return *at;
}
template <class T>
void __stcs(T* at, T value) {
    *at = value;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) { return microtome::simt::from_bits<int>(microtome::simt::bits(x)); }
inline float __int_as_float(int x) { return microtome::simt::from_bits<float>(microtome::simt::bits(x)); }
inline unsigned __float_as_uint(float x) { return microtome::simt::from_bits<unsigned>(microtome::simt::bits(x)); }
inline float __uint_as_float(unsigned x) { return microtome::simt::from_bits<float>(microtome::simt::bits(x)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
