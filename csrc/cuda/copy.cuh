// Copies from device memory to shared memory that go on while the thread computes: cp.async.
#pragma once

#include "cuda/device.cuh"

namespace microtome::cuda {

// 4, 8 or 16 bytes, both addresses multiples of that. Seen by the thread itself after wait_async, by others after a
// barrier behind it.
template <int kBytes>
__device__ void copy_async(void* shared, const void* global) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(__CUDACC__)
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
    }
#else
    simt::copy_later(shared, global, kBytes);
#endif
}

// The copies since the last commit are a group.
__device__ inline void commit_async() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    simt::commit_copies();
#endif
}

// Wait for all groups but the last kLeft.
template <int kLeft>
__device__ void wait_async() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
    simt::wait_copies(kLeft);
#endif
}

}  // namespace microtome::cuda
