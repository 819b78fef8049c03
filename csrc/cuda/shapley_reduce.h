// shapley_reduce on the GPU; cpu/shapley_reduce.h has the letters.
#pragma once

#include <cstdint>

namespace microtome::cuda {

// Addresses of contiguous device tensors; values are float64 where `wide`, else float32.
void shapley_reduce(bool wide, uintptr_t values, uintptr_t ranks, int64_t e, int64_t S, int64_t U, int64_t A, int64_t p,
                    int64_t o, bool paired, uintptr_t mean, uintptr_t m2, uintptr_t stream);

}  // namespace microtome::cuda
