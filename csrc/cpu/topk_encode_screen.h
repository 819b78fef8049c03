// What every screening kernel shares: the slack of its own float arithmetic, and how a hit is stored.
#pragma once

#include "common/simd.h"
#include "cpu/topk_encode.h"
#include "cpu/topk_encode_lists.h"

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

// What kFeatures neighbouring features have in common while every row passes by.
template <int kFeatures>
struct Step {
    float scale[kFeatures], bias[kFeatures], norm[kFeatures], residual[kFeatures], slack[kFeatures];
    float widest_norm = 0, widest_residual = 0, widest_slack = 0;

    Step(const Screening& s, int64_t start) {
        for (int g = 0; g < kFeatures; ++g) {
            const int64_t f = start + g;
            const float* stat = s.stats + f * 4;
            scale[g] = stat[0], norm[g] = stat[1], residual[g] = stat[2];
            bias[g] = s.bias ? s.bias[f] : 0.0f;
            slack[g] = kSlack * __builtin_fabsf(bias[g]) + s.tiny;
            widest_norm = norm[g] > widest_norm ? norm[g] : widest_norm;
            widest_residual = residual[g] > widest_residual ? residual[g] : widest_residual;
            widest_slack = slack[g] > widest_slack ? slack[g] : widest_slack;
        }
    }
};

// The loop around a level's tile product. `tile(w, stride, x, padded, out)` multiplies kFeatures neighbouring shadow
// rows with kRows packed rows of x (panels of kPanel rows, each kPanel * padded codes) into out[feature][row]. A block
// has at least kFeatures features (the driver sees to it), so the last step of a range may look back and pass over what
// it has seen.
//
//     score = scale_x scale_w out + bias
//     upper, lower = score +- (error_w |w| + error_r |w - shadow| + slack |bias| + tiny)
//
// The widest error of a step's features is tried first: rounding is monotone, so what misses the threshold with it
// misses it with its own error too, and nearly every feature does.
template <int kFeatures, int kRows, class Tile>
inline void screen_tiles(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1, Tile tile) {
    alignas(64) float out[kFeatures][kRows], high[kWidth], low[kWidth];
    for (int64_t f = f0; f < f1; f += kFeatures) {
        const int64_t start = f + kFeatures <= f1 ? f : (f1 > kFeatures ? f1 - kFeatures : 0);
        const int64_t first_new = f - start, end = f1 - start < kFeatures ? f1 - start : kFeatures;
        const Step<kFeatures> step(s, start);
        for (int64_t r = r0; r < r1; r += kRows) {
            tile(s.shadow + start * s.stride, s.stride, s.packed + r * s.padded, s.padded, out);
            for (int64_t row = r; row < r + kRows; row += kWidth) {
                const vf scale = load(s.scale + row), threshold = load(s.threshold + row);
                const vf error_w = load(s.error_w + row), error_r = load(s.error_r + row);
                const auto error = [&](float norm, float residual, float slack) {
                    return fma(error_w, set1(norm), fma(error_r, set1(residual), set1(slack)));
                };
                const vf widest = error(step.widest_norm, step.widest_residual, step.widest_slack);
                for (int64_t g = first_new; g < end; ++g) {
                    const vf score = fma(load(out[g] + (row - r)), mul(scale, set1(step.scale[g])), set1(step.bias[g]));
                    // "not less": a NaN is a hit, fills the list, and so takes the exact path.
                    if (!not_less(add(score, widest), threshold)) continue;
                    const vf own = error(step.norm[g], step.residual[g], step.slack[g]), upper = add(score, own);
                    unsigned hits = not_less(upper, threshold);
                    if (!hits) continue;
                    store(high, upper);
                    store(low, sub(score, own));
                    for (; hits; hits &= hits - 1) {
                        const int lane = __builtin_ctz(hits);
                        append(s, row + lane, high[lane], low[lane], start + g);
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace microtome::cpu
