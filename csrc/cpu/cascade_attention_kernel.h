// The kernels of cascade_attention and swap_key_attention, compiled once per instruction set. See simd.h for the rules
// of such files.
#pragma once

#include "cpu/cascade_attention_pairs.h"

namespace microtome::cpu {
namespace {

// Key head g of base run e, without keys of a row's own.
inline Keys base_keys(const Heads& k, const Heads& v, const BasePanels& panels, int64_t t, int64_t hk, int64_t dh,
                      int64_t first, int64_t window, int64_t e, int64_t g) {
    Keys keys = {};
    keys.base_k = at(k, e, 0, g);
    keys.base_v = at(v, e, 0, g);
    keys.base_k_token = k.token;
    keys.base_v_token = v.token;
    keys.base = t;
    keys.first = larger(first, 0);
    keys.window = window;
    keys.low = panels.low[e];
    keys.count = panels.count[e];
    keys.panels = panels.data + (panels.offset[e] * hk + g * keys.count) * dh * kPanel;
    return keys;
}

inline void attend_piece(const CascadeArguments& a, const BasePanels& panels, const Piece& piece, const Piece* next,
                         int64_t g, float* scratch) {
    const int32_t* row = a.rows + piece.row * 6;
    const int64_t e = row[0], kv_at = row[2], q_at = row[4], group = a.h / a.hk;
    Keys keys = {};
    keys.window = a.window;
    if (a.b > 0) keys = base_keys(a.k_base, a.v_base, panels, a.t, a.hk, a.dh, a.first[e], a.window, e, g);
    keys.start = row[1];
    keys.own = row[3];
    keys.own_k = at(a.k, 0, kv_at, g);
    keys.own_v = at(a.v, 0, kv_at, g);
    keys.own_k_token = a.k.token;
    keys.own_v_token = a.v.token;
    Pairs pairs;
    pairs.count = 0;
    int64_t query = q_at + piece.begin / group, member = piece.begin % group;
    for (int64_t i = piece.begin; i < piece.end; ++i) {
        add_pair(pairs, at(a.q, 0, query, g * group + member), a.q_positions[query], query * a.h + g * group + member);
        if (++member < group) continue;
        member = 0;
        ++query;
    }
    Ahead ahead[3] = {};
    if (next) {
        const int32_t* then = a.rows + next->row * 6;
        const int64_t queries = (next->end - next->begin) / group;
        ahead[0] = {at(a.q, 0, then[4] + next->begin / group, g * group), a.q.token, queries, group * a.dh};
        if (next->row != piece.row) {
            ahead[1] = {at(a.k, 0, then[2], g), a.k.token, then[3], a.dh};
            ahead[2] = {at(a.v, 0, then[2], g), a.v.token, then[3], a.dv};
        }
    }
    const Scratch s = divide(scratch, a.dh, a.dv);
    attend_pairs(keys, pairs, ahead, {a.dh, a.dv, a.scale, a.softcap}, s);
    finish(pairs, s, a.dv, a.z, a.lse);
}

// What a token's answer is made of: z' = kept z + out v_old + in v_new.
struct Mix {
    float kept[kKeys], out[kKeys], in[kKeys];
};

// The mix of vectors u .. end - 1 of tokens, from their scores with the old and the new key and their lse. Divided by
// the larger of 1 and w_new, so that no size of w_new overflows. w_old takes the place of the lse.
inline void mix(const float* old, const float* fresh, float* lse, int64_t u, int64_t end, float softcap, Mix& m) {
    for (int64_t x = u * kWidth; x < end * kWidth; x += kWidth) {
        vf s_old = load(old + x), s_new = load(fresh + x);
        if (softcap > 0) {
            s_old = capped(s_old, softcap);
            s_new = capped(s_new, softcap);
        }
        const vf whole = load(lse + x), one = set1(1.0f), more = sub(s_new, whole);
        const vf w_old = exp(at_most(sub(s_old, whole), 88.0f));
        const vf kept = exp(at_most(sub(zero(), more), 0.0f)), in = exp(at_most(more, 0.0f));
        const vf share = div(one, fma(kept, sub(one, w_old), in));
        store(m.kept + x, mul(kept, share));
        store(m.in + x, mul(in, share));
        store(m.out + x, mul(sub(zero(), mul(kept, share)), w_old));
        store(lse + x, w_old);
    }
}

inline void blend(const float* z, const float* v_old, const float* v_new, float kept, float out, float in, int64_t dv,
                  float* to) {
    const vf k = set1(kept), o = set1(out), n = set1(in);
    int64_t c = 0;
    for (; c + kWidth <= dv; c += kWidth) {
        store(to + c, fma(n, load(v_new + c), fma(o, load(v_old + c), mul(k, load(z + c)))));
    }
    if (c == dv) return;
    const int64_t left = dv - c;
    const vf base = fma(o, load_n(v_old + c, left), mul(k, load_n(z + c, left)));
    store_n(to + c, fma(n, load_n(v_new + c, left), base), left);
}

// The tokens of one row and key head. Scores with the two keys are computed as the base run computed its own, in the
// same order with the same bits, so what is taken out is what had been put in.
inline void swap_row(const SwapArguments& a, const BasePanels& panels, const BasePanels& queries, int64_t r, int64_t g,
                     int64_t token, float* scratch) {
    const int64_t e = a.rows[r * 3], position = a.rows[r * 3 + 1], stop = a.rows[r * 3 + 2], group = a.h / a.hk;
    if (position == stop) return;
    Keys keys = base_keys(a.k_base, a.v_base, panels, a.t, a.hk, a.dh, a.first[e], a.window, e, g);
    keys.start = position;
    keys.own = 1;
    keys.own_k = at(a.k_new, 0, r, g);
    keys.own_v = at(a.v_new, 0, r, g);
    const float *v_old = at(a.v_base, e, position, g), *v_new = keys.own_v;
    const float* const swapped[2] = {at(a.k_base, e, position, g), keys.own_k};
    const Sizes sizes = {a.dh, a.dv, a.scale, a.softcap};
    const Scratch s = divide(scratch, a.dh, a.dv);
    Pairs full;  // what is to be computed in full
    full.count = 0;
    const auto compute = [&] {
        attend_pairs(keys, full, {}, sizes, s);
        finish(full, s, a.dv, a.out, nullptr);
        full.count = 0;
    };
    int64_t reach = a.window > 0 ? smaller(position + a.window, stop) : stop;
    if (position < keys.first) reach = position + 1;
    for (int64_t member = 0; member < group; ++member) {
        const int64_t head = g * group + member, place = (token - position) * a.h + head;
        const auto answer = [&](int64_t i) { return a.out + (place + i * a.h) * a.dv; };
        if (full.count > kPairs - kKeys) compute();
        add_pair(full, at(a.q_new, 0, r, head), position, place + position * a.h);
        for (int64_t block = (position + 1) / kKeys * kKeys; block < reach; block += kKeys) {
            const int64_t from = larger(position + 1, block), to = smaller(reach, block + kKeys);
            const float* panel[kKeys / kPanel];
            for (int64_t p = from / kPanel; p * kPanel < to; ++p) {
                const int64_t at_panel = queries.offset[e] * a.h + head * queries.count[e] + p - queries.low[e];
                panel[p - block / kPanel] = queries.data + at_panel * a.dh * kPanel;
            }
            const int64_t u = (from - block) / kWidth, end = (to - block + kWidth - 1) / kWidth;
            if (full.count > kPairs - kKeys) compute();
            score<2>(swapped, panel, u, end, a.dh, a.scale, s.scores);
            float w_old[kKeys];
            for (int64_t x = u * kWidth; x < end * kWidth; ++x) {
                w_old[x] = block + x < to && block + x >= from ? *at(a.lse, e, block + x, head) : 0.0f;
            }
            Mix m;
            mix(s.scores, s.scores + kKeys, w_old, u, end, a.softcap, m);
            for (int64_t i = from; i < to; ++i) {
                const int64_t x = i - block;
                if (w_old[x] <= 0.5f) {
                    blend(at(a.z, e, i, head), v_old, v_new, m.kept[x], m.out[x], m.in[x], a.dv, answer(i));
                } else {
                    add_pair(full, at(a.q, e, i, head), i, place + i * a.h);
                }
            }
        }
        for (int64_t i = larger(reach, position + 1); i < stop; ++i) {
            std::memcpy(answer(i), at(a.z, e, i, head), static_cast<size_t>(a.dv) * sizeof(float));
        }
    }
    compute();
}

constexpr AttentionKernels kKernels = {pack_base, scratch_size, attend_piece, swap_row};

}  // namespace
}  // namespace microtome::cpu
