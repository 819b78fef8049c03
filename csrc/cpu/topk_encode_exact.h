// The float32 half of topk_encode, for every level: all pre-activations of a few rows, and the survivors of a
// screening. Included by each level's file; everything is in an anonymous namespace.
#pragma once

#include "common/simd.h"
#include "cpu/topk_encode.h"

namespace microtome::cpu {
namespace {

constexpr int kExactRows = 4;  // x rows that share one load of a weight row

// Four rows against one feature; the order of each sum is that of dot().
inline void dot4(const float* x, int64_t d, const float* w, float* out) {
    vf lanes[kExactRows][kParts];
    for (auto& row : lanes) {
        for (auto& part : row) part = zero();
    }
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) {
        for (int p = 0; p < kParts; ++p) {
            const vf b = load(w + i + p * kWidth);
            for (int r = 0; r < kExactRows; ++r) {
                lanes[r][p] = fma(load(x + r * d + i + p * kWidth), b, lanes[r][p]);
            }
        }
    }
    for (int p = 0; p < kParts && i + p * kWidth < d; ++p) {
        const int64_t left = d - i - p * kWidth, m = left < kWidth ? left : kWidth;
        const vf b = load_n(w + i + p * kWidth, m);
        for (int r = 0; r < kExactRows; ++r) lanes[r][p] = fma(load_n(x + r * d + i + p * kWidth, m), b, lanes[r][p]);
    }
    for (int r = 0; r < kExactRows; ++r) out[r] = fold(lanes[r]);
}

void screen_exact(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1) {
    // A block of features stays in cache while every group of rows passes over it.
    const int64_t block = s.d > 0 ? (128 * 1024) / (s.d * 4) + 1 : f1 - f0;
    for (int64_t fb = f0; fb < f1; fb += block) {
        const int64_t fe = fb + block < f1 ? fb + block : f1;
        for (int64_t r = r0; r < r1; r += kExactRows) {
            for (int64_t f = fb; f < fe; ++f) {
                float z[kExactRows];
                dot4(s.x + r * s.d, s.d, s.weights + f * s.d, z);
                for (int j = 0; j < kExactRows && r + j < r1; ++j) {
                    const float value = s.bias ? z[j] + s.bias[f] : z[j];
                    if (!(__builtin_fabsf(value) < __builtin_inff())) {  // no answer for this row
                        s.threshold[r + j] = __builtin_inff();
                        s.count[r + j] = -1;
                    }
                    // Features come in ascending order, so an equal value that comes later has lost its tie.
                    if (!(value > s.threshold[r + j])) continue;
                    Hit& hit = s.hits[(r + j) * s.capacity + s.count[r + j]];
                    hit = {value, value, static_cast<int32_t>(s.first_feature + f)};
                    if (++s.count[r + j] == s.limit[r + j]) prune_exact(s, r + j);
                }
            }
        }
    }
}

void rescore(const float* x, const float* weights, int64_t d, const Hit* hits, int64_t m, const float* bias,
             float* values) {
    for (int64_t j = 0; j < m; ++j) {
        if (j + 2 < m) {
            const char* next = reinterpret_cast<const char*>(weights + hits[j + 2].index * d);
            for (int64_t b = 0; b < d * 4; b += 64) __builtin_prefetch(next + b);
        }
        const float z = dot(x, weights + hits[j].index * d, d);
        values[j] = bias ? z + bias[hits[j].index] : z;
    }
}

}  // namespace
}  // namespace microtome::cpu
