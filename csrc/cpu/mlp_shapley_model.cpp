#include "cpu/mlp_shapley_model.h"

#include <algorithm>
#include <cstring>

#include "cpu/mlp_shapley_walk.h"
#include "cpu/pack_weights.h"

namespace microtome::cpu {
namespace {

// Whether every weight is finite.
bool finite(const MlpWeights& W) {
    uint32_t largest = 0;
    for (int64_t r = 0; r < W.o; ++r) {
        const float* row = reinterpret_cast<const float*>(W.data) + r * W.row_stride;
        for (int64_t c = 0; c < W.i; ++c) {
            uint32_t bits;
            std::memcpy(&bits, row + c * W.column_stride, sizeof bits);
            largest = std::max(largest, bits & 0x7fffffffu);
        }
    }
    return largest < 0x7f800000u;
}

}  // namespace

MlpModel::MlpModel(const MlpShapleyArguments& a, int threads) {
    const int64_t depth = static_cast<int64_t>(a.weights.size());
    mlp_ = {};
    mlp_.m = a.m, mlp_.p = a.p, mlp_.o = a.weights.back().o;
    mlp_.first_outputs = a.weights[0].o, mlp_.first_activation = a.activations[0];
    mlp_.first = reinterpret_cast<const float*>(pack(a.weights[0], false, threads));
    mlp_.first_bias = bias(a, 0);
    sort_columns(a);
    middle_.reserve(static_cast<size_t>(depth));
    for (int64_t l = 1; l + 1 < depth; ++l) {
        const MlpWeights& W = a.weights[l];
        const bool skips = a.activations[l - 1] == kRelu && finite(W);
        middle_.push_back({W.i, W.o, a.activations[l], pack(W, a.half, threads), bias(a, l), skips});
    }
    mlp_.middles = static_cast<int64_t>(middle_.size()), mlp_.middle = middle_.data();
    if (depth == 1) return;
    const MlpWeights& W = a.weights.back();
    const int64_t width = padded(W.i);
    float* last = take(mlp_.o * width);
    for (int64_t r = 0; r < W.o; ++r) {
        const float* row = reinterpret_cast<const float*>(W.data) + r * W.row_stride;
        for (int64_t c = 0; c < W.i; ++c) last[r * width + c] = row[c * W.column_stride];
    }
    mlp_.last = last, mlp_.last_inputs = W.i, mlp_.last_activation = a.activations.back();
    mlp_.last_bias = bias(a, depth - 1);
}

float* MlpModel::take(int64_t floats) {
    const int64_t bytes = std::max<int64_t>(floats, 1) * static_cast<int64_t>(sizeof(float));
    memory_.push_back(aligned(bytes));
    std::memset(memory_.back().get(), 0, static_cast<size_t>(bytes));
    return reinterpret_cast<float*>(memory_.back().get());
}

const float* MlpModel::pack(const MlpWeights& W, bool half, int threads) {
    const int64_t floats = panels_of(W.o) * (half ? (W.i + 31) / 32 * 16 : W.i) * kPanelLanes;
    float* out = take(floats);
    pack_weights(W.data, W.o, W.i, W.row_stride, W.column_stride, half, reinterpret_cast<uintptr_t>(out), threads);
    return out;
}

const float* MlpModel::bias(const MlpShapleyArguments& a, int64_t layer) {
    const int64_t o = a.weights[layer].o;
    float* out = take(padded(o));
    const auto* from = reinterpret_cast<const float*>(a.biases[layer]);
    if (from) std::memcpy(out, from, static_cast<size_t>(o) * sizeof(float));
    return out;
}

void MlpModel::sort_columns(const MlpShapleyArguments& a) {
    begin_.assign(static_cast<size_t>(a.p) + 2, 0);
    column_.resize(static_cast<size_t>(std::max<int64_t>(a.m, 1)));
    const auto player = [&a](int64_t c) { return a.player ? a.player[c] : static_cast<int32_t>(c); };
    for (int64_t c = 0; c < a.m; ++c) ++begin_[static_cast<size_t>(player(c) + 2)];
    for (size_t g = 1; g < begin_.size(); ++g) begin_[g] += begin_[g - 1];
    std::vector<int32_t> next(begin_.begin(), begin_.end());
    for (int64_t c = 0; c < a.m; ++c) {
        column_[static_cast<size_t>(next[static_cast<size_t>(player(c) + 1)]++)] = static_cast<int32_t>(c);
    }
    mlp_.column = column_.data(), mlp_.begin = begin_.data();
}

}  // namespace microtome::cpu
