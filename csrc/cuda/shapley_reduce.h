// shapley_reduce on the GPU; cpu/shapley_reduce.h has the letters.
#pragma once

#include <cstdint>

namespace microtome::cuda {

// Units summed by one block, in their order; blocks are combined in theirs.
constexpr int64_t kUnits = 128;

// Addresses of contiguous device tensors; values are float64 where `wide`, else float32. `parts` holds
// 2 * ceil(U / kUnits) * e S p o float64, or is 0 where U <= kUnits.
//
// The order of sums: a unit's orders as they come; units as they come within 128 of them, sum and squares about the
// mean so far by Youngs and Cramer (1971), S += (n x - T)^2 / (n (n - 1)) with T the sum of the first n; then the
// blocks of 128 by Chan, Golub and LeVeque (1979). It depends on U and A alone.
void shapley_reduce(bool wide, uintptr_t values, uintptr_t ranks, int64_t e, int64_t S, int64_t U, int64_t A, int64_t p,
                    int64_t o, bool paired, uintptr_t mean, uintptr_t m2, uintptr_t parts, uintptr_t stream);

}  // namespace microtome::cuda
