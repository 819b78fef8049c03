// coalition_inputs on the GPU; cpu/coalition_inputs.h has the letters.
#pragma once

#include <cstdint>

namespace microtome::cuda {

// Addresses of contiguous device tensors: x [e, m], background [n, m] and out [R, m] of items of 1, 2, 4 or 8 bytes,
// ranks [q, p], rows [R, 5], player [m] or 0, int32.
void coalition_inputs(int64_t item, uintptr_t x, uintptr_t background, uintptr_t ranks, uintptr_t rows,
                      uintptr_t player, int64_t m, int64_t p, int64_t R, uintptr_t out, uintptr_t stream);

}  // namespace microtome::cuda
