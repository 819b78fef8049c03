// attribution_scores: (source - base) * grad summed by unit of columns, and whether a unit differs, in one pass.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace microtome::cpu {

// Addresses; source, base and grad are [n, units * width] with the distance between rows beside each, bfloat16 where
// `half`, else float32. scores [n, units] float32, changed [n, units] one byte each, both contiguous.
void attribution_scores(bool half, uintptr_t source, int64_t source_stride, uintptr_t base, int64_t base_stride,
                        uintptr_t grad, int64_t grad_stride, uintptr_t scores, uintptr_t changed, int64_t n,
                        int64_t units, int64_t width, const std::string& isa, int threads);

template <class T>
struct AttributionArguments {
    const T* source;
    int64_t source_stride;
    const T* base;
    int64_t base_stride;
    const T* grad;
    int64_t grad_stride;
    float* scores;
    uint8_t* changed;
    int64_t units, width;
};

// One instruction set's kernels: rows [begin, end).
struct AttributionKernels {
    void (*f32)(const AttributionArguments<float>& a, int64_t begin, int64_t end);
    void (*b16)(const AttributionArguments<bf16>& a, int64_t begin, int64_t end);
};

extern const AttributionKernels kAttributionAvx2, kAttributionAvx512;

}  // namespace microtome::cpu
