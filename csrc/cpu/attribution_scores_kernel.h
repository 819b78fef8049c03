// The kernel of attribution_scores, compiled once per instruction set. See simd.h for the rules of such files.
#pragma once

#include "common/simd.h"
#include "cpu/attribution_scores.h"

namespace microtome::cpu {
namespace {

// <s - b, g> over d elements, summed as simd.h's dot is.
template <class T>
inline float dot_difference(const T* s, const T* b, const T* g, int64_t d) {
    vf lanes[kParts];
    for (int p = 0; p < kParts; ++p) lanes[p] = zero();
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) {
        for (int p = 0; p < kParts; ++p) {
            const int64_t at = i + p * kWidth;
            lanes[p] = fma(sub(load(s + at), load(b + at)), load(g + at), lanes[p]);
        }
    }
    for (int p = 0; p < kParts && i + p * kWidth < d; ++p) {
        const int64_t at = i + p * kWidth, n = d - at < kWidth ? d - at : kWidth;
        lanes[p] = fma(sub(load_n(s + at, n), load_n(b + at, n)), load_n(g + at, n), lanes[p]);
    }
    return fold(lanes);
}

// The first difference ends it, and the elements have just been read: it costs next to nothing.
template <class T>
inline bool differ(const T* s, const T* b, int64_t d) {
    for (int64_t i = 0; i < d; ++i) {
        if (widen(s[i]) != widen(b[i])) return true;
    }
    return false;
}

// Units of one column: nothing to sum.
template <class T>
inline void by_column(const T* s, const T* b, const T* g, float* scores, uint8_t* changed, int64_t d) {
    int64_t i = 0;
    for (; i + kWidth <= d; i += kWidth) store(scores + i, mul(sub(load(s + i), load(b + i)), load(g + i)));
    for (; i < d; ++i) scores[i] = (widen(s[i]) - widen(b[i])) * widen(g[i]);
    for (i = 0; i < d; ++i) changed[i] = widen(s[i]) != widen(b[i]);
}

template <class T>
void score_rows(const AttributionArguments<T>& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T* s = a.source + i * a.source_stride;
        const T* b = a.base + i * a.base_stride;
        const T* g = a.grad + i * a.grad_stride;
        float* scores = a.scores + i * a.units;
        uint8_t* changed = a.changed + i * a.units;
        if (a.width == 1) {
            by_column(s, b, g, scores, changed, a.units);
            continue;
        }
        for (int64_t u = 0; u < a.units; ++u, s += a.width, b += a.width, g += a.width) {
            scores[u] = dot_difference(s, b, g, a.width);
            changed[u] = differ(s, b, a.width);
        }
    }
}

}  // namespace
}  // namespace microtome::cpu
