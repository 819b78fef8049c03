#include "common/segments.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"

namespace microtome {

void sort_by_latent(const int32_t* keys, int64_t m, int64_t f, int64_t* order, int64_t* offsets, int threads) {
    // One histogram a part: parts times f stays below m + f, and a part has enough keys to pay for its histogram.
    const int64_t parts =
        std::max<int64_t>(1, std::min<int64_t>({threads, 1 + m / std::max<int64_t>(f, 1), 1 + m / 16384}));
    std::vector<int64_t> next(static_cast<size_t>(parts * f), 0);
    const auto begin = [&](int64_t part) { return m * part / parts; };
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
        int64_t* count = next.data() + part * f;
        for (int64_t e = begin(part); e < begin(part + 1); ++e) ++count[keys[e]];
    }
    int64_t position = 0;
    for (int64_t g = 0; g < f; ++g) {
        offsets[g] = position;
        for (int64_t part = 0; part < parts; ++part) {
            int64_t& slot = next[static_cast<size_t>(part * f + g)];
            const int64_t count = slot;
            slot = position;
            position += count;
        }
    }
    offsets[f] = position;
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
        int64_t* slot = next.data() + part * f;
        for (int64_t e = begin(part); e < begin(part + 1); ++e) order[slot[keys[e]]++] = e;
    }
}

}  // namespace microtome
