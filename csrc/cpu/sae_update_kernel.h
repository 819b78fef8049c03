// The passes of sae_update. Included once per instruction set.
#pragma once

#include "common/simd.h"
#include "cpu/sae_update.h"
#include "cpu/screen_row.h"

namespace microtome::cpu {
namespace {

struct Whole {
    static vf load(const float* p) { return microtome::load(p); }
    template <class T>
    static void store(T* p, vf a) {
        microtome::store(p, a);
    }
};

struct Tail {
    int64_t n;
    vf load(const float* p) const { return load_n(p, n); }
    template <class T>
    void store(T* p, vf a) const {
        store_n(p, a, n);
    }
};

// body(i, io) for every vector of d floats; io loads and stores, the last one only what is left.
template <class Body>
inline void for_vectors(int64_t d, Body body) {
    int64_t i = 0;
    for (; i + kWidth <= d; i += kWidth) body(i, Whole());
    if (i < d) body(i, Tail{d - i});
}

struct Adam {
    static constexpr bool kFirst = true, kSecond = true;
    vf l2, shrink, rest1, beta2, rest2, correction, eps, lr;
    explicit Adam(const Step& s)
        : l2(set1(s.l2)),
          shrink(set1(s.shrink)),
          rest1(set1(s.rest1)),
          beta2(set1(s.beta2)),
          rest2(set1(s.rest2)),
          correction(set1(s.inverse_correction)),
          eps(set1(s.eps)),
          lr(set1(-s.lr)) {}
    vf operator()(vf p, vf g, vf& m, vf& v) const {
        g = fma(l2, p, g);
        m = fma(rest1, sub(g, m), m);
        v = fma(mul(rest2, g), g, mul(beta2, v));
        return fma(lr, div(m, fma(sqrt(v), correction, eps)), mul(p, shrink));
    }
};

template <bool kMomentum>
struct Sgd {
    static constexpr bool kFirst = kMomentum, kSecond = false;
    vf l2, beta1, lr;
    explicit Sgd(const Step& s) : l2(set1(s.l2)), beta1(set1(s.beta1)), lr(set1(-s.lr)) {}
    vf operator()(vf p, vf g, vf& m, vf&) const {
        g = fma(l2, p, g);
        if (kMomentum) g = m = fma(beta1, m, g);
        return fma(lr, g, p);
    }
};

template <bool kMomentum>
struct Sign {
    static constexpr bool kFirst = kMomentum, kSecond = false;
    vf shrink, beta1, rest1, lr;
    explicit Sign(const Step& s)
        : shrink(set1(s.shrink)), beta1(set1(s.beta1)), rest1(set1(s.rest1)), lr(set1(-s.lr)) {}
    vf operator()(vf p, vf g, vf& m, vf&) const {
        if (kMomentum) g = m = fma(rest1, g, mul(beta1, m));
        // 2^200 times any float but zero is at least 2^51.
        const vf large = mul(mul(g, set1(0x1p100f)), set1(0x1p100f)), minus = set1(-1.0f);
        const vf sign = max(minus, sub(zero(), max(minus, sub(zero(), large))));
        return fma(lr, sign, mul(p, shrink));
    }
};

// One vector of a parameter and its moments.
template <class R, class Io>
inline void move(const R& rule, const Io& io, int64_t i, float* p, vf old, vf grad, const Moments& state) {
    vf m = zero(), v = zero();
    if (R::kFirst) m = io.load(state.m + i);
    if (R::kSecond) v = io.load(state.v + i);
    io.store(p + i, rule(old, grad, m, v));
    if (R::kFirst) io.store(state.m + i, m);
    if (R::kSecond) io.store(state.v + i, v);
}

// dec and enc get (or, unless kFresh, gain) kCount entries; every element adds them in order.
template <int kCount, bool kFresh>
inline void add_entries(const Pass& a, const Entry* e, float* dec, float* enc) {
    const float *x[kCount], *grad[kCount];
    vf value[kCount], slope[kCount];
    for (int j = 0; j < kCount; ++j) {
        x[j] = a.x + e[j].row * a.d;
        grad[j] = a.grad_out[e[j].aux] + e[j].row * a.d;
        value[j] = set1(e[j].value);
        slope[j] = set1(e[j].grad);
    }
    for_vectors(a.d, [&](int64_t i, auto io) {
        vf s = kFresh ? zero() : io.load(dec + i), t = kFresh ? zero() : io.load(enc + i);
        for (int j = 0; j < kCount; ++j) {
            s = fma(value[j], io.load(grad[j] + i), s);
            t = fma(slope[j], io.load(x[j] + i), t);
        }
        io.store(dec + i, s);
        io.store(enc + i, t);
    });
}

template <bool kFresh>
inline void add_up_to_four(const Pass& a, const Entry* e, int64_t count, float* dec, float* enc) {
    switch (count) {
        case 1:
            return add_entries<1, kFresh>(a, e, dec, enc);
        case 2:
            return add_entries<2, kFresh>(a, e, dec, enc);
        case 3:
            return add_entries<3, kFresh>(a, e, dec, enc);
        default:
            return add_entries<4, kFresh>(a, e, dec, enc);
    }
}

void sum_entries(const Pass& a, const Entry* e, int64_t count, float* dec, float* enc) {
    if (count == 0) {
        std::memset(dec, 0, static_cast<size_t>(a.d) * sizeof(float));
        std::memset(enc, 0, static_cast<size_t>(a.d) * sizeof(float));
        return;
    }
    add_up_to_four<true>(a, e, count, dec, enc);
    for (int64_t done = 4; done < count; done += 4) add_up_to_four<false>(a, e + done, count - done, dec, enc);
}

inline void add_row(const float* row, int64_t d, float* sum) {
    for_vectors(d, [&](int64_t i, auto io) { io.store(sum + i, add(io.load(sum + i), io.load(row + i))); });
}

void sum_rows(const float* rows, int64_t count, int64_t d, float* out) {
    std::memset(out, 0, static_cast<size_t>(d) * sizeof(float));
    for (int64_t i = 0; i < count; ++i) add_row(rows + i * d, d, out);
}

// The row of the extra gradients that is feature g's, or -1.
inline int64_t row_of(const Pass& a, int64_t g) { return a.place ? a.place[g] : -1; }

// The two weight gradients of feature g, from its entries.
inline void sum_segment(const Pass& a, int64_t g, float* dec, float* enc) {
    const int64_t begin = a.offsets[g], count = a.offsets[g + 1] - begin;
    if (count <= kChunk) return sum_entries(a, a.entries + begin, count, dec, enc);
    const float* partial = a.partials + a.partial[g] * 2 * a.d;
    const int64_t chunks = (count + kChunk - 1) / kChunk;
    std::memcpy(dec, partial, static_cast<size_t>(a.d) * sizeof(float));
    std::memcpy(enc, partial + a.d, static_cast<size_t>(a.d) * sizeof(float));
    for (int64_t c = 1; c < chunks; ++c) {
        add_row(partial + c * 2 * a.d, a.d, dec);
        add_row(partial + c * 2 * a.d + a.d, a.d, enc);
    }
}

// Rows that will be needed next, asked for a line at a time while this row streams: the next parameter rows, because a
// processor's own prefetcher stops at every page and a row is about a page; and the rows of x or grad_out that the next
// feature gathers. Measured at
// (n, d, f, k) = (1024, 768, 24576, 32), one thread: 81 ms without; 62 to 89, median 72, in five runs with.
struct Ahead {
    static constexpr int kMost = 24;
    int count = 0, most;
    const float* rows[kMost];
    explicit Ahead(int64_t d) : most(static_cast<int>(32768 / d < kMost - 3 ? 3 + 32768 / d : kMost)) {}  // 128 KiB
    void push(const float* row) {
        if (row) rows[count++] = row;
    }
    void operator()(int64_t i) const {
        if (i % 16 == 0) {
            for (int j = 0; j < count; ++j) __builtin_prefetch(rows[j] + i, 0, 2);
        }
    }
};

inline Moments at(const Moments& state, int64_t i) {
    return {state.m ? state.m + i : nullptr, state.v ? state.v + i : nullptr};
}

// Seen from the encoder row of g: its decoder row, and the next feature's rows of x.
inline Ahead ahead_of_encoder(const Pass& a, int64_t g, bool last) {
    Ahead ahead(a.d);
    const Moments state = at(a.dec, g * a.d);
    ahead.push(a.W_dec + g * a.d);
    ahead.push(state.m);
    ahead.push(state.v);
    for (int64_t e = a.offsets[g + 1]; !last && e < a.offsets[g + 2] && ahead.count < ahead.most; ++e) {
        ahead.push(a.x + a.entries[e].row * a.d);
    }
    return ahead;
}

// Seen from the decoder row of g: the next feature's encoder row, and its rows of grad_out.
inline Ahead ahead_of_decoder(const Pass& a, int64_t g, bool last) {
    Ahead ahead(a.d);
    if (last) return ahead;
    const Moments state = at(a.enc, (g + 1) * a.d);
    ahead.push(a.W_enc + (g + 1) * a.d);
    ahead.push(state.m);
    ahead.push(state.v);
    for (int64_t e = a.offsets[g + 1]; e < a.offsets[g + 2] && ahead.count < ahead.most; ++e) {
        ahead.push(a.grad_out[a.entries[e].aux] + a.entries[e].row * a.d);
    }
    return ahead;
}

// encoder_part -= db * row, for a row that stays as it is.
inline void add_encoder_part(const float* row, int64_t d, float db, float* encoder_part) {
    const vf back = set1(-db);
    for_vectors(d, [&](int64_t i, auto io) {
        io.store(encoder_part + i, fma(back, io.load(row + i), io.load(encoder_part + i)));
    });
}

template <class R>
void update_encoder_row(const Pass& a, const R& rule, int64_t g, float db, const float* grad, float* encoder_part,
                        const Ahead& ahead) {
    float* row = a.W_enc + g * a.d;
    const Moments state = at(a.enc, g * a.d);
    const vf back = set1(-db);
    if (a.center && db != 0.0f) {
        for_vectors(a.d, [&](int64_t i, auto io) {
            ahead(i);
            const vf p = io.load(row + i);
            io.store(encoder_part + i, fma(back, p, io.load(encoder_part + i)));
            move(rule, io, i, row, p, io.load(grad + i), state);
        });
    } else {
        for_vectors(a.d, [&](int64_t i, auto io) {
            ahead(i);
            move(rule, io, i, row, io.load(row + i), io.load(grad + i), state);
        });
    }
}

template <class R>
void update_decoder_row(const Pass& a, const R& rule, int64_t g, const float* grad, const Ahead& ahead) {
    float* row = a.W_dec + g * a.d;
    const Moments state = at(a.dec, g * a.d);
    float along = 0.0f;
    if (a.project && (a.offsets[g + 1] > a.offsets[g] || row_of(a, g) >= 0)) {
        const float square = dot(row, row, a.d);
        along = -dot(grad, row, a.d) / (square > 1e-30f ? square : 1e-30f);
    }
    const vf back = set1(along);
    for_vectors(a.d, [&](int64_t i, auto io) {
        ahead(i);
        const vf p = io.load(row + i);
        move(rule, io, i, row, p, fma(back, p, io.load(grad + i)), state);
    });
    if (a.renorm) {
        const float norm = __builtin_sqrtf(dot(row, row, a.d));
        const vf length = set1(norm > 1e-30f ? norm : 1e-30f);
        for_vectors(a.d, [&](int64_t i, auto io) { io.store(row + i, div(io.load(row + i), length)); });
    }
}

// The row while it is in the cache, rounded to nearest even.
inline void copy_row(const float* row, int64_t d, bf16* copy) {
    for_vectors(d, [&](int64_t i, auto io) { io.store(copy + i, io.load(row + i)); });
}

template <class R>
void update_vector_with(const Step& s, float* p, const float* grad, Moments state, int64_t count) {
    const R rule(s);
    for_vectors(count, [&](int64_t i, auto io) { move(rule, io, i, p, io.load(p + i), io.load(grad + i), state); });
}

template <class R>
int64_t update_features_with(const Pass& a, int64_t begin, int64_t end, float* encoder_part, float* scratch) {
    const R rule(a.weights);
    float *dec = scratch, *enc = scratch + a.d;
    int64_t bad = -1;
    for (int64_t g = begin; g < end; ++g) {
        const int64_t from = a.offsets[g], to = a.offsets[g + 1];
        const int64_t extra = row_of(a, g);
        double db = extra < 0 ? 0 : a.extra_bias[extra];
        bool touched = extra >= 0;
        for (int64_t e = from; e < to; ++e) {
            db += a.entries[e].grad;
            touched |= a.entries[e].value != 0.0f;
        }
        a.db_enc[g] = static_cast<float>(db);
        if (a.rowsparse && !touched) {
            if (a.center && db != 0) add_encoder_part(a.W_enc + g * a.d, a.d, a.db_enc[g], encoder_part);
            continue;
        }
        sum_segment(a, g, dec, enc);
        if (extra >= 0) {
            add_row(a.extra_dec + extra * a.d, a.d, dec);
            add_row(a.extra_enc + extra * a.d, a.d, enc);
        }
        const bool last = g + 1 == end;
        update_encoder_row(a, rule, g, a.db_enc[g], enc, encoder_part, ahead_of_encoder(a, g, last));
        if (a.W_enc_bf16) copy_row(a.W_enc + g * a.d, a.d, a.W_enc_bf16 + g * a.d);
        if (a.kind >= 0 &&
            !screen_row(a.W_enc + g * a.d, a.d, a.stride, a.kind, a.shadow + g * a.stride, a.stats + g * 4) &&
            bad < 0) {
            bad = g;
        }
        update_decoder_row(a, rule, g, dec, ahead_of_decoder(a, g, last));
        if (a.W_dec_bf16) copy_row(a.W_dec + g * a.d, a.d, a.W_dec_bf16 + g * a.d);
        if (a.rowsparse) update_vector_with<R>(a.biases, a.b_enc + g, a.db_enc + g, at(a.bias, g), 1);
    }
    if (!a.rowsparse) {
        update_vector_with<R>(a.biases, a.b_enc + begin, a.db_enc + begin, at(a.bias, begin), end - begin);
    }
    return bad;
}

int64_t update_features(const Pass& a, int64_t begin, int64_t end, float* encoder_part, float* scratch) {
    const bool momentum = a.enc.m != nullptr;
    switch (a.weights.rule) {
        case Rule::kAdam:
            return update_features_with<Adam>(a, begin, end, encoder_part, scratch);
        case Rule::kSgd:
            return momentum ? update_features_with<Sgd<true>>(a, begin, end, encoder_part, scratch)
                            : update_features_with<Sgd<false>>(a, begin, end, encoder_part, scratch);
        default:
            return momentum ? update_features_with<Sign<true>>(a, begin, end, encoder_part, scratch)
                            : update_features_with<Sign<false>>(a, begin, end, encoder_part, scratch);
    }
}

void update_vector(const Step& s, float* p, const float* grad, Moments state, int64_t count) {
    switch (s.rule) {
        case Rule::kAdam:
            return update_vector_with<Adam>(s, p, grad, state, count);
        case Rule::kSgd:
            return state.m ? update_vector_with<Sgd<true>>(s, p, grad, state, count)
                           : update_vector_with<Sgd<false>>(s, p, grad, state, count);
        default:
            return state.m ? update_vector_with<Sign<true>>(s, p, grad, state, count)
                           : update_vector_with<Sign<false>>(s, p, grad, state, count);
    }
}

constexpr SaeUpdateKernels kSaeUpdateKernels = {sum_entries, sum_rows, update_features, update_vector};

}  // namespace
}  // namespace microtome::cpu
