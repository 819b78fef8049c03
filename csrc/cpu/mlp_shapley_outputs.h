// The way out of a network: its last layer, of few outputs, in float32.
#pragma once

#include "cpu/mlp_shapley_walk.h"

namespace microtome::cpu {
namespace {

// The last product begins where the sums of the one before end: out [rows][o][16] gathers, lane by lane, the products
// of ReLU(sums + bias) with the rows of `last` [o, stride], in the order of simd.h's `dot`.
struct ReluDots {
    const float *bias, *last;
    int64_t stride, o;
    float* out;
    int64_t column;
    ReluDots at(int64_t from) const { return {bias, last, stride, o, out, column + from}; }
    void operator()(int r, vf left, vf right) const {
        const vf a = max(zero(), add(left, load(bias + column))),
                 b = max(zero(), add(right, load(bias + column + kWidth)));
        float* to = out + r * o * 16;
        const float* w = last + column;
        for (int64_t j = 0; j < o; ++j, to += 16, w += stride) {
            if constexpr (kParts == 1) {
                store(to, fma(b, load(w + kWidth), fma(a, load(w), load(to))));
            } else {
                float *one = to + column % 16, *other = to + (column + kWidth) % 16;
                store(one, fma(a, load(w), load(one)));
                store(other, fma(b, load(w + kWidth), load(other)));
            }
        }
    }
};

// values [count, o] from the sums that ReluDots left.
inline void fold_dots(const Mlp& mlp, const float* out, int64_t count, float* values) {
    for (int64_t r = 0; r < count; ++r, values += mlp.o) {
        for (int64_t j = 0; j < mlp.o; ++j, out += 16) {
            vf lanes[kParts];
            for (int part = 0; part < kParts; ++part) lanes[part] = load(out + part * kWidth);
            values[j] = fold(lanes) + mlp.last_bias[j];
        }
    }
}

// R rows by J outputs at a time: as many sums as registers hold, so that what is loaded is used more than once.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotOutputs = 4;
#else
constexpr int kDotRows = 1, kDotOutputs = 4 / kParts;
#endif

template <int R, int J>
inline void dots(const Mlp& mlp, const float* rows, int64_t width, int64_t j, float* values) {
    vf s[R][J][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int q = 0; q < J; ++q) {
            for (int part = 0; part < kParts; ++part) s[r][q][part] = zero();
        }
    }
    for (int64_t c = 0; c < width; c += 16) {
#pragma GCC unroll 4
        for (int q = 0; q < J; ++q) {
            const float* w = mlp.last + (j + q) * width + c;
            for (int part = 0; part < kParts; ++part) {
                const vf weights = load(w + part * kWidth);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    s[r][q][part] = fma(load(rows + r * width + c + part * kWidth), weights, s[r][q][part]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int q = 0; q < J; ++q) values[r * mlp.o + j + q] = fold(s[r][q]) + mlp.last_bias[j + q];
    }
}

template <int J, int R = kDotRows>
inline void dots_of_rows(const Mlp& mlp, const float* rows, int64_t width, int64_t count, int64_t j, float* values) {
    for (; count >= R; count -= R, rows += R * width, values += R * mlp.o) dots<R, J>(mlp, rows, width, j, values);
    if constexpr (R > 1) dots_of_rows<J, R / 2>(mlp, rows, width, count, j, values);
}

// values [count, o] = the last layer of rows [count, inputs], from output j on.
template <int J = kDotOutputs>
void last_layer(const Mlp& mlp, const float* rows, int64_t count, float* values, int64_t j = 0) {
    const int64_t width = padded(mlp.last_inputs);
    for (; j + J <= mlp.o; j += J) dots_of_rows<J>(mlp, rows, width, count, j, values);
    if constexpr (J > 1) last_layer<J / 2>(mlp, rows, count, values, j);
}

}  // namespace
}  // namespace microtome::cpu
