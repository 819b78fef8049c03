// Weights in panels of 32 outputs; the layout is in ops/pack_weights.py.
#pragma once

#include <cstdint>

namespace microtome::cpu {

// W [o, i] float32 with strides in elements -> out: float32 [ceil(o/32), i, 32], or, where `half`, bfloat16
// [ceil(o/32), 16 ceil(i/32), 32, 2].
void pack_weights(uintptr_t W, int64_t o, int64_t i, int64_t row_stride, int64_t column_stride, bool half,
                  uintptr_t out, int threads);

}  // namespace microtome::cpu
