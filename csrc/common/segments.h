// Entries of a sparse code grouped by the latent they belong to.
#pragma once

#include <cstdint>

namespace microtome {

// Stable counting sort of m keys in [0, f). order[offsets[g] .. offsets[g + 1]) are the positions of the entries with
// key g, ascending. order holds m and offsets f + 1 numbers. Any thread count gives the same answer. Scratch: at most
// 8 (m + f) bytes.
void sort_by_latent(const int32_t* keys, int64_t m, int64_t f, int64_t* order, int64_t* offsets, int threads);

}  // namespace microtome
