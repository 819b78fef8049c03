// sparse_decode and its two gradients: out[i] = b + sum_j values[i, j] W[indices[i, j]].
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace microtome::cpu {

// Addresses of contiguous tensors; float tensors are bfloat16 where `half`, else float32; indices are int32.
// Each returns the first position whose index lies outside [0, f), and then has written nothing, or -1.

// values, indices [n, k], W [f, d], b [d] or 0 -> out [n, d].
int64_t sparse_decode(bool half, uintptr_t values, uintptr_t indices, uintptr_t W, uintptr_t b, uintptr_t out,
                      int64_t n, int64_t k, int64_t d, int64_t f, const std::string& isa, int threads);

// grad_out [n, d], indices [n, k], W [f, d] -> out [n, k].
int64_t sparse_decode_grad_values(bool half, uintptr_t grad_out, uintptr_t indices, uintptr_t W, uintptr_t out,
                                  int64_t n, int64_t k, int64_t d, int64_t f, const std::string& isa, int threads);

// values, indices [n, k], grad_out [n, d] -> out [f, d]. The same bits for any number of threads.
int64_t sparse_decode_grad_W_dec(bool half, uintptr_t values, uintptr_t indices, uintptr_t grad_out, uintptr_t out,
                                 int64_t n, int64_t k, int64_t d, int64_t f, const std::string& isa, int threads);

// One instruction set's kernels for one storage type, over a range of rows or features. padded(d) is d rounded up to a
// multiple of 16.
template <class T>
struct SparseDecodeTable {
    // Rows [begin, end); scratch [padded(d)].
    void (*decode)(const T* values, const int32_t* indices, const T* W, const T* b, T* out, float* scratch,
                   int64_t begin, int64_t end, int64_t k, int64_t d);
    void (*grad_values)(const T* grad_out, const int32_t* indices, const T* W, T* out, int64_t begin, int64_t end,
                        int64_t k, int64_t d);
    // Features [begin, end) of entries sorted by feature; scratch [2, padded(d)].
    void (*grad_W_dec)(const T* values, const T* grad_out, const int64_t* order, const int64_t* offsets, T* out,
                       float* scratch, int64_t begin, int64_t end, int64_t k, int64_t d);
};

struct SparseDecodeKernels {
    SparseDecodeTable<float> f32;
    SparseDecodeTable<bf16> b16;
};

extern const SparseDecodeKernels kSparseDecodeAvx2, kSparseDecodeAvx512;

}  // namespace microtome::cpu
