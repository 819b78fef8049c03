// One source for the GPU and for the emulator: nvcc gives CUDA, any other compiler the fibers of csrc/emulator.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

#if defined(__CUDACC__)
// Throw std::runtime_error with CUDA's message. The error is forgotten: cudaGetLastError gives the thread's last one,
// so the next launch would take it for its own.
inline void check(const char* name, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(name) + ": CUDA says: " + cudaGetErrorString(status));
}
#endif

// Let a kernel have so many bytes of dynamic shared memory. Makes a context current where the thread has none.
template <class... P>
void allow_shared(const char* name, void (*kernel)(P...), size_t bytes) {
#if defined(__CUDACC__)
    check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
#else
    static_cast<void>(name), static_cast<void>(kernel), static_cast<void>(bytes);
#endif
}

// Dynamic shared memory that a kernel has without asking: 48 KiB, less what its own arrays take, which is below 16
// here.
constexpr size_t kUnasked = 32 << 10;

// Bytes of shared memory that a block can have on the current device, a kernel's own arrays included.
inline int64_t most_shared() {
#if defined(__CUDACC__)
    int device = 0, bytes = 0;
    check("cudaGetDevice", cudaGetDevice(&device));
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return bytes;
#else
    return static_cast<int64_t>(simt::most_shared());
#endif
}

// Enqueue a kernel. Throws std::runtime_error with CUDA's message; a launch that fails has started nothing.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Geometry& g, A... arguments) {
    if (g.grid.x == 0 || g.grid.y == 0 || g.grid.z == 0) return;
    const bool asks = g.shared > kUnasked;
#if defined(__CUDACC__)
    static std::mutex asking;  // what one thread allows a kernel, another must not lower before the launch
    std::unique_lock<std::mutex> lock(asking, std::defer_lock);
    if (asks) {
        lock.lock();
        allow_shared(name, kernel, g.shared);
    }
    kernel<<<g.grid, g.block, g.shared, reinterpret_cast<cudaStream_t>(g.stream)>>>(static_cast<P>(arguments)...);
    check(name, cudaGetLastError());
#else
    static_cast<void>(name);
    const size_t most = asks ? simt::most_shared() : simt::kUnasked;
    simt::run(g.grid, g.block, g.shared, [&] { kernel(static_cast<P>(arguments)...); }, most);
#endif
}

// A grid of rows by `across` blocks, all along x: along y a GPU takes 65535. `place_in` tells a block where it is.
inline dim3 along_x(const char* name, int64_t rows, int64_t across) {
    constexpr int64_t kMostBlocks = 0x7FFFFFFF;
    if (across > 0 && rows > kMostBlocks / across) {
        throw std::runtime_error(std::string(name) + ": a launch of " + std::to_string(rows) + " x " +
                                 std::to_string(across) + " blocks (a GPU takes 2^31 - 1). Use fewer rows at a time.");
    }
    return dim3(static_cast<unsigned>(rows * across));
}

// Blocks that lie along y, cut into launches that a GPU takes: the first of each, and how many.
inline std::vector<std::pair<unsigned, unsigned>> slabs(int64_t blocks) {
    constexpr int64_t kMostBlocks = 65535;
    std::vector<std::pair<unsigned, unsigned>> out;
    for (int64_t first = 0; first < blocks; first += kMostBlocks) {
        out.emplace_back(static_cast<unsigned>(first), static_cast<unsigned>(std::min(kMostBlocks, blocks - first)));
    }
    return out;
}

struct Place {
    unsigned row, across;
};

// Neighbouring blocks differ in their row.
__host__ __device__ inline Place place_in(unsigned block, int64_t rows) {
    const auto count = static_cast<unsigned>(rows);
    return {block % count, block / count};
}

// Kernels of one thread per item: as many blocks of 256 as it takes.
inline Geometry one_thread_each(int64_t items, uintptr_t stream) {
    return {dim3(static_cast<unsigned>((items + 255) / 256)), dim3(256), 0, stream};
}

}  // namespace microtome::cuda
