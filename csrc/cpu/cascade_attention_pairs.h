// Softmax attention of up to kPairs queries over keys that lie partly in a base run, partly in a row of its own.
// See simd.h for the rules of such files.
//
// Keys are transposed into panels, those of the base once a call for all rows; values are read where they lie. Keys are
// taken kKeys at a time, by position, and every query's sums run over keys in order, whatever queries share a tile or a
// call: the bits depend on no split of the work.
#pragma once

#include "cpu/cascade_attention.h"
#include "cpu/cascade_attention_tile.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kPairs = 192;  // queries taken at a time, whose running sums stay in the second-level cache

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline const float* at(const Heads& a, int64_t example, int64_t token, int64_t head) {
    return a.data + example * a.example + token * a.token + head * a.head;
}

// One key head: keys at positions start .. start + own - 1 are the row's own, the others those of the base run.
struct Keys {
    const float *base_k, *base_v, *own_k, *own_v;
    int64_t base_k_token, base_v_token, own_k_token, own_v_token;
    int64_t base, start, own, first, window;
    const float* panels;  // of the base, from panel `low` on
    int64_t low, count;
};

struct Pairs {
    int64_t count;
    const float* q[kPairs];
    int64_t position[kPairs];
    int64_t place[kPairs];  // among all (query, head) of the answer
};

inline void add_pair(Pairs& pairs, const float* q, int64_t position, int64_t place) {
    pairs.q[pairs.count] = q;
    pairs.position[pairs.count] = position;
    pairs.place[pairs.count] = place;
    ++pairs.count;
}

struct Sizes {
    int64_t dh, dv;
    float scale, softcap;
};

// Rows of memory that are wanted next, asked for a few at a time while this piece's tiles are computed.
struct Ahead {
    const float* from;
    int64_t stride, count, width;
};

inline void ask(const Ahead& ahead, int64_t step, int64_t steps) {
    for (int64_t x = ahead.count * step / steps; x < ahead.count * (step + 1) / steps; ++x) {
        const float* row = ahead.from + x * ahead.stride;
        for (int64_t c = 0; c < ahead.width; c += 16) __builtin_prefetch(row + c);
    }
}

// Results are out [kPairs, padded(dv)], not yet divided by sum [kPairs], and top [kPairs], the largest scores.
struct Scratch {
    float *panels, *scores, *out, *top, *sum, *zeros;
};

inline int64_t scratch_size(int64_t dh, int64_t dv) {
    return kKeys * dh + kRows * kKeys + kPairs * (padded(dv) + 2) + padded(dh);
}

inline Scratch divide(float* scratch, int64_t dh, int64_t dv) {
    Scratch s;
    s.panels = scratch;
    s.scores = s.panels + kKeys * dh;
    s.out = s.scores + kRows * kKeys;
    s.top = s.out + kPairs * padded(dv);
    s.sum = s.top + kPairs;
    s.zeros = s.sum + kPairs;
    for (int64_t i = 0; i < dh; ++i) s.zeros[i] = 0;
    return s;
}

// The first position that a query at `position` may see.
inline int64_t lowest_seen(const Keys& keys, int64_t position) {
    return keys.window > 0 ? larger(keys.first, position - keys.window + 1) : keys.first;
}

// Pairs i .. i + M - 1 against the keys of one block.
template <int M>
inline void attend_tile(const Keys& keys, const Pairs& pairs, int64_t i, int64_t block, bool fresh,
                        const float* const* panel, const float* const* value, const Sizes& a, const Scratch& s) {
    int64_t from[M], to[M], low = kKeys, high = 0;
    for (int m = 0; m < M; ++m) {
        const int64_t position = pairs.position[i + m];
        from[m] = larger(lowest_seen(keys, position) - block, 0);
        to[m] = smaller(position + 1 - block, kKeys);
        if (from[m] >= to[m]) continue;
        low = smaller(low, from[m]);
        high = larger(high, to[m]);
    }
    float* out = s.out + i * padded(a.dv);
    if (low >= high) {
        if (fresh) std::memset(out, 0, static_cast<size_t>(M * padded(a.dv)) * sizeof(float));
        return;
    }
    const int64_t u = low / kWidth, end = (high + kWidth - 1) / kWidth;
    score<M>(pairs.q + i, panel, u, end, a.dh, a.scale, s.scores);
    float factor[M];
    for (int m = 0; m < M; ++m) {
        factor[m] =
            soften(s.scores + m * kKeys, u, end, from[m], to[m], a.softcap, fresh, s.top + i + m, s.sum + i + m);
    }
    weigh<M>(s.scores, value, low, high, a.dv, factor, fresh, out);
}

template <int M = kRows>
inline void attend_rest(int64_t count, const Keys& keys, const Pairs& pairs, int64_t i, int64_t block, bool fresh,
                        const float* const* panel, const float* const* value, const Sizes& a, const Scratch& s) {
    if constexpr (M > 1) {
        if (count < M) return attend_rest<M - 1>(count, keys, pairs, i, block, fresh, panel, value, a, s);
    }
    attend_tile<M>(keys, pairs, i, block, fresh, panel, value, a, s);
}

// The key at position x, or `none` where there is none.
inline const float* key_at(const Keys& keys, int64_t x, const float* none) {
    if (x >= keys.start && x < keys.start + keys.own) return keys.own_k + (x - keys.start) * keys.own_k_token;
    return x < keys.base ? keys.base_k + x * keys.base_k_token : none;
}

// Panels and value rows of the positions [from, to) of a block. A panel of the base is used where it lies.
inline void gather_block(const Keys& keys, int64_t block, int64_t from, int64_t to, int64_t dh, const Scratch& s,
                         const float** panel, const float** value) {
    const int64_t own = smaller(larger(keys.start, from), to), after = smaller(larger(keys.start + keys.own, own), to);
    for (int64_t x = from; x < own; ++x) value[x - block] = keys.base_v + x * keys.base_v_token;
    for (int64_t x = own; x < after; ++x) value[x - block] = keys.own_v + (x - keys.start) * keys.own_v_token;
    for (int64_t x = after; x < to; ++x) value[x - block] = keys.base_v + x * keys.base_v_token;
    for (int64_t p = from / kPanel; p * kPanel < to; ++p) {
        const int64_t x = p * kPanel, place = p - block / kPanel;
        const bool apart = x + kPanel <= keys.start || x >= keys.start + keys.own;
        if (apart && p >= keys.low && p < keys.low + keys.count) {
            panel[place] = keys.panels + (p - keys.low) * dh * kPanel;
            continue;
        }
        const float* row[kPanel];
        for (int j = 0; j < kPanel; ++j) {
            row[j] = key_at(keys, x + j, s.zeros);
        }
        float* packed = s.panels + place * dh * kPanel;
        pack_panel(row, dh, packed);
        panel[place] = packed;
    }
}

// Fills s.out, s.top and s.sum for all pairs.
inline void attend_pairs(const Keys& keys, const Pairs& pairs, const Ahead (&ahead)[3], const Sizes& a,
                         const Scratch& s) {
    int64_t lowest = INT64_MAX, highest = -1;
    for (int64_t i = 0; i < pairs.count; ++i) {
        s.top[i] = kNone;
        s.sum[i] = 0;
        const int64_t from = lowest_seen(keys, pairs.position[i]);
        if (from > pairs.position[i]) continue;
        lowest = smaller(lowest, from);
        highest = larger(highest, pairs.position[i]);
    }
    if (highest < 0) {
        std::memset(s.out, 0, static_cast<size_t>(pairs.count * padded(a.dv)) * sizeof(float));
        return;
    }
    const float *panel[kKeys / kPanel], *value[kKeys];
    bool fresh = true;
    for (int64_t block = lowest / kKeys * kKeys; block <= highest; block += kKeys) {
        gather_block(keys, block, larger(lowest, block), smaller(highest + 1, block + kKeys), a.dh, s, panel, value);
        for (int64_t i = 0; i < pairs.count; i += kRows) {
            attend_rest(pairs.count - i, keys, pairs, i, block, fresh, panel, value, a, s);
            if (!fresh) continue;
            for (const Ahead& next : ahead) ask(next, i / kRows, (pairs.count + kRows - 1) / kRows);
        }
        fresh = false;
    }
}

// z [places, dv] = out / sum and lse [places] = top + ln sum of all pairs; zero and -inf where nothing was seen.
inline void finish(const Pairs& pairs, const Scratch& s, int64_t dv, float* z, float* lse) {
    for (int64_t i = 0; i < pairs.count; i += kWidth) {
        float log_sum[kWidth];
        if (lse) store(log_sum, add(load(s.top + i), log(max(set1(1.0f), load(s.sum + i)))));
        for (int64_t j = i; j < i + kWidth && j < pairs.count; ++j) {
            if (lse) lse[pairs.place[j]] = log_sum[j - i];
            float* to = z + pairs.place[j] * dv;
            const float* out = s.out + j * padded(dv);
            const vf share = set1(s.sum[j] == 0 ? 0.0f : 1.0f / s.sum[j]);
            int64_t c = 0;
            for (; c + kWidth <= dv; c += kWidth) store(to + c, mul(share, load(out + c)));
            if (c < dv) store_n(to + c, mul(share, load(out + c)), dv - c);
        }
    }
}

// Panel number `panel` of every head of one example.
inline void pack_base(const Heads& from, int64_t tokens, int64_t heads, int64_t width, const BasePanels& to,
                      int64_t example, int64_t panel, float* scratch) {
    for (int64_t i = 0; i < width; ++i) scratch[i] = 0;
    for (int64_t g = 0; g < heads; ++g) {
        const float* row[kPanel];
        for (int64_t j = 0; j < kPanel; ++j) {
            const int64_t x = panel * kPanel + j;
            row[j] = x < tokens ? at(from, example, x, g) : scratch;
        }
        const int64_t place = to.offset[example] * heads + g * to.count[example] + panel - to.low[example];
        pack_panel(row, width, to.data + place * width * kPanel);
    }
}

}  // namespace
}  // namespace microtome::cpu
