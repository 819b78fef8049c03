// The screen of topk_encode on Hopper: kernels/topk_encode.py's prediction and filter, on wgmma and the copy engine.
#pragma once

#include <cstdint>

namespace microtome::cuda {

// Addresses of device tensors. x [rows, d] and w [f, d] are bf16, 16-byte aligned, their strides, in elements,
// multiples of 8; statistics are [., 4] float32: 1, norm, norm of what rounding lost, 0. b_enc [f] float32 may be 0. To
// be run on compute capability 9.0 alone.

// Append to index [rows, capacity] the features whose value may reach theta [rows]; count [rows], zero before, counts
// those beyond the capacity as well.
void topk_encode_filter(uintptr_t x, int64_t x_stride, uintptr_t x_stats, uintptr_t w, int64_t w_stride,
                        uintptr_t w_stats, uintptr_t b_enc, uintptr_t theta, uintptr_t count, uintptr_t index,
                        int64_t rows, int64_t f, int64_t d, int64_t capacity, uintptr_t stream);

// Maxima of groups of 1, 4 or 16 of every stride-th feature: maxima [rows, ceil(ceil(f / stride) / 256) * 256 / group],
// -inf where there is no feature.
void topk_encode_sample(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, uintptr_t b_enc, uintptr_t maxima,
                        int64_t rows, int64_t f, int64_t d, int64_t stride, int64_t group, uintptr_t stream);

}  // namespace microtome::cuda
