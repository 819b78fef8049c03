// Weighted sums of gathered rows and dot products with gathered rows, the two loops every sparse code runs on.
// Anonymous namespace and no containers, as simd.h says. Rows come as pointers; each call also names the rows that
// will be wanted later, whose cache lines it asks for while it works.
#pragma once

#include "common/simd.h"

namespace microtome {
namespace {

constexpr int64_t kGroup = 4;    // rows streamed side by side: enough to hide latency, few enough for the registers
constexpr int64_t kChunk = 256;  // entries whose weights and row pointers are held at once

template <class T>
struct Entries {
    float weight[kChunk];
    const T* row[kChunk + kGroup];  // the last ones are only asked for
};

// Entries [at, at + count) of a code, and the rows that follow them up to `end`.
template <class T>
inline void gather(Entries<T>& out, const T* values, const int32_t* indices, const T* W, int64_t at, int64_t count,
                   int64_t end, int64_t d) {
    for (int64_t e = 0; e < count + kGroup; ++e) {
        const int64_t from = at + e < end ? at + e : end - 1;
        out.row[e] = W + indices[from] * d;
    }
    if (!values) return;
    for (int64_t e = 0; e < count; ++e) out.weight[e] = widen(values[at + e]);
}

// Floats that a running sum of d elements occupies: whole vectors, so that a short one is never stored in part and
// read back whole.
inline int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }

// acc [padded(d)] = (fresh ? 0 : acc) + sum_g weight[g] row[g], g in order.
template <int G, class T>
inline void add_group(float* acc, bool fresh, const float* weight, const T* const* row, const T* const* ahead,
                      int64_t d) {
    vf w[G];
    const T *r[G], *next[G];
    for (int g = 0; g < G; ++g) {
        w[g] = set1(weight[g]);
        r[g] = row[g];
        next[g] = ahead[g];
    }
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) {
        for (int g = 0; g < G; ++g) __builtin_prefetch(next[g] + i);
        for (int p = 0; p < kParts; ++p) {
            const int64_t at = i + p * kWidth;
            vf s = fresh ? zero() : load(acc + at);
            for (int g = 0; g < G; ++g) s = fma(w[g], load(r[g] + at), s);
            store(acc + at, s);
        }
    }
    for (; i < d; i += kWidth) {
        const int64_t n = d - i < kWidth ? d - i : kWidth;
        vf s = fresh ? zero() : load(acc + i);
        for (int g = 0; g < G; ++g) s = fma(w[g], load_n(r[g] + i, n), s);
        store(acc + i, s);
    }
}

// acc [padded(d)] = (fresh ? 0 : acc) + sum_e weight[e] row[e], in entry order.
template <class T>
inline void add_rows(float* acc, bool fresh, const Entries<T>& entries, int64_t count, int64_t d) {
    const T* const* row = entries.row;
    int64_t e = 0;
    for (; e + kGroup <= count; e += kGroup) {
        add_group<kGroup>(acc, fresh && e == 0, entries.weight + e, row + e, row + e + kGroup, d);
    }
    const bool first = fresh && e == 0;
    const T* const* ahead = row + count;
    if (count - e == 1) add_group<1>(acc, first, entries.weight + e, row + e, ahead, d);
    if (count - e == 2) add_group<2>(acc, first, entries.weight + e, row + e, ahead, d);
    if (count - e == 3) add_group<3>(acc, first, entries.weight + e, row + e, ahead, d);
    if (fresh && count == 0) std::memset(acc, 0, static_cast<size_t>(d) * sizeof(float));
}

// out[g] = <a, row[g]>, each summed as simd.h's dot is.
template <int G, class A, class T>
inline void dot_group(float* out, const A* a, const T* const* row, const T* const* ahead, int64_t d) {
    vf lanes[G][kParts];
    const T *r[G], *next[G];
    for (int g = 0; g < G; ++g) {
        r[g] = row[g];
        next[g] = ahead[g];
        for (int p = 0; p < kParts; ++p) lanes[g][p] = zero();
    }
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) {
        for (int g = 0; g < G; ++g) __builtin_prefetch(next[g] + i);
        for (int p = 0; p < kParts; ++p) {
            const vf left = load(a + i + p * kWidth);
            for (int g = 0; g < G; ++g) lanes[g][p] = fma(left, load(r[g] + i + p * kWidth), lanes[g][p]);
        }
    }
    for (int p = 0; p < kParts && i + p * kWidth < d; ++p) {
        const int64_t at = i + p * kWidth, n = d - at < kWidth ? d - at : kWidth;
        const vf left = load_n(a + at, n);
        for (int g = 0; g < G; ++g) lanes[g][p] = fma(left, load_n(r[g] + at, n), lanes[g][p]);
    }
    for (int g = 0; g < G; ++g) out[g] = fold(lanes[g]);
}

// out [count] = <a, row[e]>; while entry e is read, the lines of ahead[e] are asked for.
template <class A, class T>
inline void dot_rows(float* out, const A* a, const T* const* row, const T* const* ahead, int64_t count, int64_t d) {
    int64_t e = 0;
    for (; e + kGroup <= count; e += kGroup) dot_group<kGroup>(out + e, a, row + e, ahead + e, d);
    for (; e < count; ++e) dot_group<1>(out + e, a, row + e, ahead + e, d);
}

}  // namespace
}  // namespace microtome
