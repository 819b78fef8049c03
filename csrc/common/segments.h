// Entries grouped by latent: the order in which gradients of [f, d] parameters are summed without atomics.
#pragma once

#include <cstdint>

namespace microtome {

// Positions 0..m-1 stably sorted by key, and the f + 1 starts of each key's positions. Keys lie in [0, f).
// The answer does not depend on `threads`. Extra memory: at most f + max(f, m) counters.
void sort_by_latent(const int32_t* keys, int64_t m, int64_t f, int64_t* order, int64_t* offsets, int threads);

// The first position whose index lies outside [0, f), or -1.
int64_t first_outside(const int32_t* indices, int64_t m, int64_t f);

}  // namespace microtome
