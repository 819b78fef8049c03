// A register tile of attention: scores of up to kRows queries with the keys of a block, their softmax, and the weighted
// sum of the values. Scores have queries as rows and sixteen keys as lanes. See simd.h for the rules of such files.
#pragma once

#include "common/gather.h"
#include "common/panel.h"
#include "common/vector_math.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kKeys = 128;  // keys taken at a time
constexpr int kRows = 6;        // queries of a register tile
#if defined(__AVX512F__)
constexpr int kColumns = 4;  // vectors of a register tile
#else
constexpr int kColumns = 2;
#endif
constexpr float kNone = -__builtin_inff();

// out[m, n] = scale * <q[m], column n of keys>, M queries and N vectors of keys, summed in the order of the elements.
template <int M, int N>
inline void score_tile(const float* const* q, const float* const* keys, int64_t dh, float scale, float* out) {
    vf acc[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) acc[m][n] = zero();
    }
    for (int64_t i = 0; i < dh; ++i) {
        vf k[N];
        for (int n = 0; n < N; ++n) k[n] = load(keys[n] + i * kPanel);
        for (int m = 0; m < M; ++m) {
            const vf one = set1(q[m][i]);
            for (int n = 0; n < N; ++n) acc[m][n] = fma(one, k[n], acc[m][n]);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) store(out + m * kKeys + n * kWidth, mul(acc[m][n], set1(scale)));
    }
}

template <int M, int N = kColumns>
inline void score_columns(int64_t n, const float* const* q, const float* const* keys, int64_t dh, float scale,
                          float* out) {
    if constexpr (N > 1) {
        if (n < N) return score_columns<M, N - 1>(n, q, keys, dh, scale, out);
    }
    score_tile<M, N>(q, keys, dh, scale, out);
}

// Scores of M queries with the keys of vectors u .. end - 1 of a block.
template <int M>
inline void score(const float* const* q, const float* const* panel, int64_t u, int64_t end, int64_t dh, float scale,
                  float* out) {
    while (u < end) {
        const int64_t tiles = (end - u + kColumns - 1) / kColumns, n = (end - u + tiles - 1) / tiles;
        const float* keys[kColumns];
        for (int64_t j = 0; j < n; ++j) keys[j] = panel[(u + j) / kParts] + (u + j) % kParts * kWidth;
        score_columns<M>(n, q, keys, dh, scale, out + u * kWidth);
        u += n;
    }
}

inline vf capped(vf s, float softcap) { return mul(set1(softcap), tanh(div(s, set1(softcap)))); }

// Scores [from, to) of one query become weights exp(s - top), the rest of vectors u .. end - 1 zero. Moves top and sum,
// and returns what earlier sums are to be multiplied by.
inline float soften(float* s, int64_t u, int64_t end, int64_t from, int64_t to, float softcap, bool fresh, float* top,
                    float* sum) {
    if (from >= to) {
        for (; u < end; ++u) store(s + u * kWidth, zero());
        return 1.0f;
    }
    vf best = set1(kNone);
    for (int64_t i = u; i < end; ++i) {
        const int64_t x = i * kWidth;
        vf v = load(s + x);
        if (softcap > 0) v = capped(v, softcap);
        if (x < from || x + kWidth > to) v = within(v, from - x, to - x, kNone);
        store(s + x, v);
        best = max(best, v);
    }
    const float before = *top, here = largest(best);
    *top = before > here ? before : here;
    const vf subtracted = set1(*top);
    vf lanes[kParts];
    for (int p = 0; p < kParts; ++p) lanes[p] = zero();
    for (int64_t i = u; i < end; ++i) {
        const int64_t x = i * kWidth;
        vf e = exp(sub(load(s + x), subtracted));
        if (x < from || x + kWidth > to) e = within(e, from - x, to - x, 0.0f);
        store(s + x, e);
        lanes[i % kParts] = add(lanes[i % kParts], e);
    }
    const float part = fold(lanes);
    if (fresh || before == kNone) {
        *sum = part;
        return 0.0f;
    }
    float factor[kWidth];
    store(factor, exp(set1(before - *top)));
    *sum = *sum * factor[0] + part;
    return factor[0];
}

// out[m, c ..] = (fresh ? 0 : factor[m] out[m, c ..]) + sum of weights[m, x] value[x][c ..] over x in [from, to): N
// vectors of columns, or where kPart the first `part` columns of one.
template <int M, int N, bool kPart>
inline void weigh_tile(const float* weights, const float* const* value, int64_t from, int64_t to, int64_t c,
                       int64_t part, const float* factor, bool fresh, float* out, int64_t stride) {
    vf acc[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            acc[m][n] = fresh ? zero() : mul(set1(factor[m]), load(out + m * stride + c + n * kWidth));
        }
    }
    for (int64_t x = from; x < to; ++x) {
        const float* row = value[x] + c;
        vf v[N];
        for (int n = 0; n < N; ++n) v[n] = kPart ? load_n(row, part) : load(row + n * kWidth);
        for (int m = 0; m < M; ++m) {
            const vf w = set1(weights[m * kKeys + x]);
            for (int n = 0; n < N; ++n) acc[m][n] = fma(w, v[n], acc[m][n]);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) store(out + m * stride + c + n * kWidth, acc[m][n]);
    }
}

template <int M, int N = kColumns>
inline void weigh_columns(int64_t count, const float* weights, const float* const* value, int64_t from, int64_t to,
                          int64_t c, const float* factor, bool fresh, float* out, int64_t stride) {
    if constexpr (N > 1) {
        if (count < N) {
            return weigh_columns<M, N - 1>(count, weights, value, from, to, c, factor, fresh, out, stride);
        }
    }
    weigh_tile<M, N, false>(weights, value, from, to, c, 0, factor, fresh, out, stride);
}

template <int M>
inline void weigh(const float* weights, const float* const* value, int64_t from, int64_t to, int64_t dv,
                  const float* factor, bool fresh, float* out) {
    const int64_t stride = padded(dv);
    int64_t c = 0, left = dv / kWidth;
    while (left > 0) {
        const int64_t tiles = (left + kColumns - 1) / kColumns, n = (left + tiles - 1) / tiles;
        weigh_columns<M>(n, weights, value, from, to, c, factor, fresh, out, stride);
        c += n * kWidth;
        left -= n;
    }
    if (c < dv) weigh_tile<M, 1, true>(weights, value, from, to, c, dv - c, factor, fresh, out, stride);
}

}  // namespace
}  // namespace microtome::cpu
