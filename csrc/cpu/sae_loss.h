// sae_loss: squared error of a sparse reconstruction, its gradient, and the gradient of the values, in one pass.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace microtome::cpu {

// Addresses of contiguous tensors; float tensors are bfloat16 where `half`, else float32; indices are int32.
// x [n, d], values, indices [n, k], W [f, d], b [d] or 0 -> sse [n] float32, grad_out [n, d], grad_values [n, k].
// Returns the first position whose index lies outside [0, f), and then has written nothing, or -1.
int64_t sae_loss(bool half, uintptr_t x, uintptr_t values, uintptr_t indices, uintptr_t W, uintptr_t b, uintptr_t sse,
                 uintptr_t grad_out, uintptr_t grad_values, int64_t n, int64_t k, int64_t d, int64_t f,
                 const std::string& isa, int threads);

template <class T>
struct SaeLossArguments {
    const T *x, *values;
    const int32_t* indices;
    const T *W, *b;
    float* sse;
    T *grad_out, *grad_values;
    int64_t k, d;
};

// One instruction set's kernels: rows [begin, end), scratch [d rounded up to a multiple of 16].
struct SaeLossKernels {
    void (*f32)(const SaeLossArguments<float>& a, float* scratch, int64_t begin, int64_t end);
    void (*b16)(const SaeLossArguments<bf16>& a, float* scratch, int64_t begin, int64_t end);
};

extern const SaeLossKernels kSaeLossAvx2, kSaeLossAvx512;

}  // namespace microtome::cpu
