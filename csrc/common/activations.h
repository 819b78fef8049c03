// The activations of a multilayer perceptron on one vector, with torch's default parameters. NaN stays NaN. Anonymous
// namespace and no containers, as simd.h says.
#pragma once

#include "common/vector_math.h"

namespace microtome {
namespace {

// The codes of ops/_mlp_shapley_inputs.py, in its order.
enum Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid, kLeakyRelu, kElu, kSoftplus };
constexpr int kActivations = kSoftplus + 1;

inline vf sigmoid(vf h) {
    const vf one = set1(1.0f);
    return div(one, add(one, exp(at_most(sub(zero(), h), 88.0f))));
}

template <int code>
inline vf activate(vf h) {
    if constexpr (code == kRelu) {
        return max(zero(), h);
    } else if constexpr (code == kGelu) {
        // h P(Z < h) without cancellation: relu(h) - |h| P(Z > |h|).
        const vf a = at_most(magnitude(h), 8.0f);
        return sub(max(zero(), h), mul(a, normal_tail(a)));
    } else if constexpr (code == kGeluTanh) {
        // (1 + tanh(s)) / 2 = sigmoid(2 s), 2 s = sqrt(8 / pi) (h + 0.044715 h^3)
        return mul(h, sigmoid(mul(h, fma(mul(h, h), set1(0.0713548163f), set1(1.59576912f)))));
    } else if constexpr (code == kSilu) {
        return mul(h, sigmoid(h));
    } else if constexpr (code == kTanh) {
        return tanh(h);
    } else if constexpr (code == kSigmoid) {
        return sigmoid(h);
    } else if constexpr (code == kLeakyRelu) {
        return max(mul(h, set1(0.01f)), h);
    } else if constexpr (code == kElu) {
        return add(max(zero(), h), expm1(at_most(h, 0.0f)));
    } else if constexpr (code == kSoftplus) {
        return add(max(zero(), h), log1p(exp(sub(zero(), magnitude(h)))));
    } else {
        return h;
    }
}

}  // namespace
}  // namespace microtome
