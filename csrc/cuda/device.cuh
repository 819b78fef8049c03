// One source for the GPU and for the emulator: nvcc gives CUDA, any other compiler the fibers of csrc/emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define MICROTOME_DYNAMIC_SHARED(T, name)                           \
    extern __shared__ __align__(1024) unsigned char shared_bytes[]; \
    T* const name = reinterpret_cast<T*>(shared_bytes)
#define MICROTOME_SHARED(T, name, count) __shared__ T name[count]
#else
#include "emulator/simt.h"
#define MICROTOME_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(::microtome::simt::dynamic_shared())
#define MICROTOME_SHARED(T, name, count)                             \
    T* const name = static_cast<T*>(::microtome::simt::shared_array( \
        [] {                                                         \
            static char key;                                         \
            return &key;                                             \
        }(),                                                         \
        sizeof(T) * (count)))
#endif

namespace microtome::cuda {

template <class T>
__host__ __device__ T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct Geometry {
    dim3 grid, block;
    size_t shared = 0;  // bytes of dynamic shared memory
    uintptr_t stream = 0;
};

// Enqueue a kernel. Throws std::runtime_error with CUDA's message; a launch that fails has started nothing.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Geometry& g, A... arguments) {
    if (g.grid.x == 0 || g.grid.y == 0 || g.grid.z == 0) return;
#if defined(__CUDACC__)
    cudaError_t status = cudaSuccess;
    if (g.shared > 48 << 10) {
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(g.shared));
    }
    if (status == cudaSuccess) {
        kernel<<<g.grid, g.block, g.shared, reinterpret_cast<cudaStream_t>(g.stream)>>>(static_cast<P>(arguments)...);
        status = cudaGetLastError();
    }
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(name) + ": CUDA says: " + cudaGetErrorString(status));
    }
#else
    static_cast<void>(name);
    simt::run(g.grid, g.block, g.shared, [&] { kernel(static_cast<P>(arguments)...); });
#endif
}

// Kernels of one thread per item: as many blocks of 256 as it takes.
inline Geometry one_thread_each(int64_t items, uintptr_t stream) {
    return {dim3(static_cast<unsigned>((items + 255) / 256)), dim3(256), 0, stream};
}

}  // namespace microtome::cuda
