// Uniformly random orders of p players, each from the seed and its own number alone.
#pragma once

#include <cstdint>

namespace microtome::cuda {

constexpr int64_t kMostPlayers = 4096;  // whose keys are sorted in shared memory

// ranks[i, j] = the place of player j in order samples[i], in [0, p). Player j's key is word j % 2 of Philox4x32-10 at
// counter (j / 2, 0, samples[i]) under the seed, with its low 12 bits replaced by j; the least key comes first.
// samples is [n] int64, ranks [n, p] int32.
void random_ranks(uintptr_t samples, uintptr_t ranks, int64_t n, int64_t p, uint64_t seed, uintptr_t stream);

}  // namespace microtome::cuda
