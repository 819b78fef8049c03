// The activations of a multilayer perceptron on one vector, with torch's default parameters. NaN stays NaN. Anonymous
// namespace and no containers, as simd.h says.
#pragma once

#include "common/vector_math.h"

namespace microtome {
namespace {

// The codes of ops/_mlp_shapley_inputs.py, in its order.
enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kLeakyRelu, kElu, kSoftplus };
constexpr int kActivations = kSoftplus + 1;

template <class V>
inline V sigmoid(V h) {
    const V one = all<V>(1.0f);
    return div(one, add(one, exp(at_most(sub(all<V>(0.0f), h), 88.0f))));
}

// V is a vector or Four.
template <int code, class V>
inline V activate(V h) {
    const V none = all<V>(0.0f);
    if constexpr (code == kRelu) {
        return max(none, h);
    } else if constexpr (code == kGelu) {
        // h P(Z < h) without cancellation: relu(h) - |h| P(Z < -|h|).
        const V t = max(all<V>(-8.0f), sub(none, magnitude(h)));
        return fma(t, normal_tail(t), max(none, h));
    } else if constexpr (code == kGeluTanh) {
        // (1 + tanh(s)) / 2 = sigmoid(2 s), 2 s = sqrt(8 / pi) (h + 0.044715 h^3)
        return mul(h, sigmoid(mul(h, fma(mul(h, h), all<V>(0.0713548163f), all<V>(1.59576912f)))));
    } else if constexpr (code == kSilu) {
        return mul(h, sigmoid(h));
    } else if constexpr (code == kTanh) {
        return tanh(h);
    } else if constexpr (code == kSigmoid) {
        return sigmoid(h);
    } else if constexpr (code == kLeakyRelu) {
        return max(mul(h, all<V>(0.01f)), h);
    } else if constexpr (code == kElu) {
        return add(max(none, h), expm1(at_most(h, 0.0f)));
    } else if constexpr (code == kSoftplus) {
        return add(max(none, h), log1p(exp(sub(none, magnitude(h)))));
    } else {
        return h;
    }
}

// rows [count], where a bias [32] is added to each 32 neighbours, become activations.
template <int code>
void activate_rows(float* rows, const float* bias, int64_t count) {
    constexpr int kSpan = 4 * kWidth;
    int64_t i = 0;
    for (; i + kSpan <= count; i += kSpan) {
        float *at = rows + i, *next = at + 2 * kWidth;
        const float *b = bias + i % 32, *more = bias + (i + 2 * kWidth) % 32;
        const Four h = {load(at), load(at + kWidth), load(next), load(next + kWidth)};
        const Four y = activate<code>(add(h, {load(b), load(b + kWidth), load(more), load(more + kWidth)}));
        store(at, y.a);
        store(at + kWidth, y.b);
        store(next, y.c);
        store(next + kWidth, y.d);
    }
    for (; i < count; i += kWidth) {
        const int64_t n = count - i < kWidth ? count - i : kWidth;
        store_n(rows + i, activate<code>(add(load_n(rows + i, n), load_n(bias + i % 32, n))), n);
    }
}

template <int code = 0>
inline void activate_any(int wanted, float* rows, const float* bias, int64_t count) {
    if (wanted == code) return activate_rows<code>(rows, bias, count);
    if constexpr (code + 1 < kActivations) activate_any<code + 1>(wanted, rows, bias, count);
}

}  // namespace
}  // namespace microtome
