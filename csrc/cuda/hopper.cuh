// sm_90a's instructions as functions: mbarriers, tensor maps and the copy engine, warpgroup products, setmaxnreg.
//
// nvcc gets inline PTX, the host compiler csrc/emulator/hopper.h, which says what each means. Names of sections are
// those of the PTX ISA, 9.7.
#pragma once

#include "cuda/device.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cudaTypedefs.h>
#else
#include "emulator/hopper.h"
#endif

// Whether the code being compiled may use them; elsewhere a kernel's body is left out.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MICROTOME_SM90A 1
#else
#define MICROTOME_SM90A 0
#endif

namespace microtome::cuda::hopper {

// "Matrix Descriptor Format" of a bf16 matrix, K-major, 64 columns of it in rows of 128 bytes, 128-byte swizzle: eight
// rows are an atom, the next eight lie 1024 bytes on. The pattern starts at multiples of 1024, so the base offset is 0.
// To step 16 columns to the right, add 32 >> 4: the swizzle works on the address that the step leads to.
__device__ __forceinline__ uint64_t descriptor(uint32_t shared) {
    return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
           uint64_t{1} << 62;
}
constexpr uint64_t kNextColumns = 32 >> 4;

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t complete;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}\n"
            : "=r"(complete)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!complete);
}
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void tensor_copy(void* to, const TensorMap& map, int32_t column, int32_t row,
                                            uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from reading the registers before what stands above.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define MICROTOME_REGISTERS_8(i)                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define MICROTOME_REGISTERS_64(i)                                                                    \
    MICROTOME_REGISTERS_8(i), MICROTOME_REGISTERS_8(i + 8), MICROTOME_REGISTERS_8(i + 16),           \
        MICROTOME_REGISTERS_8(i + 24), MICROTOME_REGISTERS_8(i + 32), MICROTOME_REGISTERS_8(i + 40), \
        MICROTOME_REGISTERS_8(i + 48), MICROTOME_REGISTERS_8(i + 56)

// d = a b^T (+ d): [64, 128] or [64, 256] of bf16 matrices with 16 columns in shared memory, both K-major, not negated.
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, p, 1, 1, 0, 0;\n}\n"
        : MICROTOME_REGISTERS_64(0), MICROTOME_REGISTERS_64(64)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}\n"
        : MICROTOME_REGISTERS_64(0)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

#undef MICROTOME_REGISTERS_64
#undef MICROTOME_REGISTERS_8

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.b32 %0, 1, 0, p;\n}\n" : "=r"(elected));
    return elected;
}
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

using simt::TensorMap, simt::elect_one, simt::fence_barrier_init, simt::mbarrier_arrive,
    simt::mbarrier_arrive_expect_tx, simt::mbarrier_init, simt::mbarrier_wait, simt::shared_address, simt::tensor_copy,
    simt::wgmma_commit_group, simt::wgmma_fence;

inline void prefetch(const TensorMap&) {}
template <int N>
void wgmma(float (&d)[N], uint64_t a, uint64_t b, bool accumulate) {
    simt::wgmma(d, 2 * N, a, b, accumulate);
}
template <int PENDING>
void wgmma_wait_group() {
    simt::wgmma_wait_group(PENDING);
}
template <int N>
void hold(float (&)[N]) {}
template <int REGISTERS>
void give_registers() {
    simt::set_max_registers(REGISTERS);
}
template <int REGISTERS>
void take_registers() {
    simt::set_max_registers(REGISTERS);
}
inline void named_barrier(int id, int threads) { simt::barrier(id, threads); }
inline void named_barrier_arrive(int id, int threads) { simt::barrier_arrive(id, threads); }

#endif

// bf16 [rows, columns] read in boxes of box_rows x 64 columns, 128-byte swizzle, zeros out of bounds. The address must
// be 16-byte aligned and row_bytes a multiple of 16. Found through the runtime, so that nothing links to libcuda.
inline TensorMap tensor_map(const char* name, uintptr_t address, uint64_t rows, uint64_t columns, uint64_t row_bytes,
                            uint32_t box_rows) {
#if defined(__CUDACC__)
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(name, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (found == nullptr) {
        throw std::runtime_error(std::string(name) + ": the driver has no cuTensorMapEncodeTiled (needs CUDA 12)");
    }
    TensorMap map;
    const cuuint64_t sizes[2] = {columns, rows}, strides[1] = {row_bytes};
    const cuuint32_t box[2] = {64, box_rows}, steps[2] = {1, 1};
    const CUresult encoded = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, reinterpret_cast<void*>(address), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (encoded != CUDA_SUCCESS) {
        throw std::runtime_error(std::string(name) + ": cuTensorMapEncodeTiled returned " + std::to_string(encoded));
    }
    return map;
#else
    static_cast<void>(name);
    return simt::encode_tensor_map(reinterpret_cast<const void*>(address), columns, rows, row_bytes, 64, box_rows,
                                   simt::Swizzle::k128);
#endif
}

}  // namespace microtome::cuda::hopper
