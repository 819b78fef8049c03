// What sm_90a adds, for the emulator: mbarriers, tensor maps and the copy engine, warpgroup products, setmaxnreg.
//
// Each function is written from the section of the PTX ISA that it names, not from the kernels that call it, and throws
// std::runtime_error where the ISA leaves the behaviour undefined and the emulator can see it. Copies and products
// happen later, when the scheduler likes: one that is not waited for leaves the NaN that stood there before.
#pragma once

#include <cstddef>
#include <cstdint>

namespace microtome::simt {

// CUtensorMapSwizzle's order. B bits of the address, from bit 4 up, are XORed with those from bit 7 up.
enum class Swizzle : uint32_t { kNone = 0, k32 = 1, k64 = 2, k128 = 3 };

// A tensor map of 2-byte elements, two-dimensional, tiled, element strides of 1, zeros out of bounds.
struct TensorMap {
    const unsigned char* address;
    uint64_t columns, rows, row_bytes;  // columns are neighbours
    uint32_t box_columns, box_rows;
    Swizzle swizzle;
};
// Throws where cuTensorMapEncodeTiled would return CUDA_ERROR_INVALID_VALUE.
TensorMap encode_tensor_map(const void* address, uint64_t columns, uint64_t rows, uint64_t row_bytes,
                            uint32_t box_columns, uint32_t box_rows, Swizzle swizzle);

// An address in the window of shared memory, as cvta.to.shared gives. The first KiB belongs to the system.
uint32_t shared_address(const void* at);

// Parallel Synchronization and Communication Instructions: mbarrier. The object's 64 bits lie in the memory given.
void mbarrier_init(uint64_t* barrier, uint32_t arrivals);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes);
// Until the phase of that parity has completed: try_wait.parity in a loop.
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
// Makes initialised barriers visible to the async proxy: fence.mbarrier_init, fence.proxy.async.
void fence_barrier_init();

// cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes, tile mode.
void tensor_copy(void* to, const TensorMap& map, int32_t column, int32_t row, uint64_t* barrier);

// wgmma.mma_async.sync.aligned.m64n<N>k16.f32.bf16.bf16 with both operands K-major in shared memory:
// d = a b^T (+ d), d [N / 2] being the thread's registers.
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate);
void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(int pending);

// setmaxnreg.dec and .inc: registers a thread of the warpgroup may hold from now on.
void set_max_registers(int registers);
// elect.sync over a full warp.
bool elect_one();

}  // namespace microtome::simt
