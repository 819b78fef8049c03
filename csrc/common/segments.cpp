#include "common/segments.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"

namespace microtome {

void sort_by_latent(const int32_t* keys, int64_t m, int64_t f, int64_t* order, int64_t* offsets, int threads) {
    // Each thread counts a slice of its own: no more slices than keep the counters within m, and none so short that
    // waiting for the other threads costs more than the counting.
    constexpr int64_t kSlice = 1 << 18;
    const int64_t slices = std::clamp<int64_t>(m / std::max(f, kSlice), 1, std::max(threads, 1));
    std::vector<int64_t> next(static_cast<size_t>(slices * f), 0);  // [slices, f]
    const int team = static_cast<int>(slices);
#pragma omp parallel for num_threads(team) schedule(static, 1)
    for (int64_t s = 0; s < slices; ++s) {
        int64_t* count = next.data() + s * f;
        for (int64_t e = m * s / slices; e < m * (s + 1) / slices; ++e) ++count[keys[e]];
    }
    int64_t start = 0;
    for (int64_t g = 0; g < f; ++g) {
        offsets[g] = start;
        for (int64_t s = 0; s < slices; ++s) {
            const int64_t count = next[s * f + g];
            next[s * f + g] = start;
            start += count;
        }
    }
    offsets[f] = start;
#pragma omp parallel for num_threads(team) schedule(static, 1)
    for (int64_t s = 0; s < slices; ++s) {
        int64_t* to = next.data() + s * f;
        for (int64_t e = m * s / slices; e < m * (s + 1) / slices; ++e) order[to[keys[e]]++] = e;
    }
}

int64_t first_outside(const int32_t* indices, int64_t m, int64_t f) {
    // As unsigned, a negative index is above every f. The loop without a branch is the one compilers vectorise.
    const uint32_t limit = static_cast<uint32_t>(std::min<int64_t>(f, INT32_MAX));
    constexpr int64_t kBlock = 4096;
    for (int64_t start = 0; start < m; start += kBlock) {
        const int64_t stop = std::min(start + kBlock, m);
        uint32_t bad = 0;
        for (int64_t e = start; e < stop; ++e) bad |= static_cast<uint32_t>(indices[e]) >= limit;
        if (!bad) continue;
        for (int64_t e = start; e < stop; ++e) {
            if (static_cast<uint32_t>(indices[e]) >= limit) return e;
        }
    }
    return -1;
}

}  // namespace microtome
