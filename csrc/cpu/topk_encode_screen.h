// What every screening kernel shares: the slack of its own float arithmetic, and how a hit is stored.
#pragma once

#include "common/simd.h"
#include "cpu/topk_encode.h"

namespace microtome::cpu {
namespace {

// 16 roundings of a score or a bound, relative to |x||w| + |bias|: see docs/exactness.md.
constexpr float kSlack = 0x1p-20f;

inline void append(const Screening& s, int64_t row, float upper, float lower, int64_t feature) {
    int32_t& count = s.count[row];
    if (count < 0) return;  // overflowed: the row takes the exact path
    s.hits[row * s.capacity + count] = {upper, lower, static_cast<int32_t>(s.first_feature + feature)};
    if (++count == s.limit[row]) prune_bounds(s, row);
}

// score = scale_x scale_w acc + bias; upper and lower = score +- (error_w |w| + error_r |w - shadow| + slack |bias|).
// `rows` are kWidth neighbours; acc is the low-precision dot product of each with feature `f`.
inline void filter(const Screening& s, int64_t row, int64_t f, vf acc, vf scale, vf error_w, vf error_r, vf threshold) {
    const float* stat = s.stats + f * 4;
    const float bias = s.bias ? s.bias[f] : 0.0f;
    const vf score = fma(acc, mul(scale, set1(stat[0])), set1(bias));
    const vf error = fma(error_w, set1(stat[1]), fma(error_r, set1(stat[2]), set1(kSlack * __builtin_fabsf(bias))));
    const vf upper = add(score, error);
    unsigned hits = not_less(upper, threshold);  // a NaN is a hit, fills the list, and so takes the exact path
    if (!hits) return;
    alignas(64) float high[kWidth], low[kWidth];
    store(high, upper);
    store(low, sub(score, error));
    for (; hits; hits &= hits - 1) {
        const int lane = __builtin_ctz(hits);
        append(s, row + lane, high[lane], low[lane], f);
    }
}

// The loop around a level's tile product. `tile(w, stride, x, padded, out)` multiplies kFeatures neighbouring shadow
// rows with kRows packed rows of x (panels of kPanel rows, each kPanel * padded codes) into out[feature][row]. A block
// has at least kFeatures features (the driver sees to it), so the last step of a range may look back and pass over what
// it has seen.
template <int kFeatures, int kRows, class Tile>
inline void screen_tiles(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1, Tile tile) {
    alignas(64) float out[kFeatures][kRows];
    for (int64_t f = f0; f < f1; f += kFeatures) {
        const int64_t start = f + kFeatures <= f1 ? f : (f1 > kFeatures ? f1 - kFeatures : 0);
        for (int64_t r = r0; r < r1; r += kRows) {
            tile(s.shadow + start * s.stride, s.stride, s.packed + r * s.padded, s.padded, out);
            for (int64_t row = r; row < r + kRows; row += kWidth) {
                const vf scale = load(s.scale + row), threshold = load(s.threshold + row);
                const vf error_w = load(s.error_w + row), error_r = load(s.error_r + row);
                for (int64_t g = f - start; g < kFeatures && start + g < f1; ++g) {
                    filter(s, row, start + g, load(out[g] + (row - r)), scale, error_w, error_r, threshold);
                }
            }
        }
    }
}

}  // namespace
}  // namespace microtome::cpu
