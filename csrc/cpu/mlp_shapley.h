// mlp_shapley: Shapley values of a multilayer perceptron along permutations. Here the model as the kernels read it, and
// one level's loops; mlp_shapley.cpp cuts the work and folds what comes out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace microtome::cpu {

// A layer between the first and the last. Its weights lie in panels of 32 outputs, its bias is zero beyond `outputs`,
// up to whole panels.
struct MiddleLayer {
    int64_t inputs, outputs;
    int activation;
    const void* packed;
    const float* bias;
    bool skips;  // an input of zero may be left out: the layer before is a ReLU, and every weight is finite
};

// Rows of floats are padded with zeros to whole panels.
struct Mlp {
    int64_t m, p, o;
    int64_t first_outputs;
    const float* first;       // [panels, m, 32]
    const float* first_bias;  // [panels * 32]
    int first_activation;
    const int32_t* column;  // [m]: columns of x by player, those of no player first
    const int32_t* begin;   // [p + 2]: where the columns of no player begin, those of player 0, ..., and the end
    int64_t middles;
    const MiddleLayer* middle;
    const float* last;  // [o, inputs padded]; null where the first layer is the last
    const float* last_bias;
    int last_activation;
    int64_t last_inputs;
};

// One coalition after another: start anew where `anew`, and add a player's columns; player p adds nothing. `left`
// counts the steps up to the next that starts anew, this one included.
struct WalkStep {
    int32_t player, anew, left;
};

// What a thread works in: addresses in one allocation, see mlp_shapley_kernel.h.
struct MlpKernels {
    int64_t (*scratch_bytes)(const Mlp& mlp);
    // The first layer's answer with the row b, and what each player adds to it: start [panels, 32] and
    // gains [panels, p + 1, 32], the last one zero, both in scratch.
    void (*prepare)(const Mlp& mlp, const float* x, const float* b, char* scratch);
    // values [count, o] of the coalitions that `steps` walk through, after prepare.
    void (*evaluate)(const Mlp& mlp, const WalkStep* steps, int64_t count, char* scratch, float* values);
};

// A matrix or vector of the caller: float32, strides in elements; data 0 for none.
struct MlpWeights {
    uintptr_t data;
    int64_t o, i, row_stride, column_stride;
};

struct MlpShapleyArguments {
    const float *x, *background;  // [e, m], [n, m] contiguous
    const int32_t* ranks;         // [S, U, A, p]
    int64_t e, n, m, S, U, A, p;
    std::vector<MlpWeights> weights;
    std::vector<uintptr_t> biases;
    std::vector<int> activations;
    const int32_t* player;  // [m] or null
    bool paired, half;
    double *mean, *m2;  // [e, S, p, o]
};

// Returns the first order, as a position in [S, U, A], that is no permutation, and then has written nothing, or -1.
int64_t mlp_shapley(const MlpShapleyArguments& a, const std::string& isa, int threads);

extern const MlpKernels kMlpAvx2, kMlpAvx512, kMlpHalfAvx2, kMlpHalfAvx512, kMlpHalfAvx512Bf16;
extern const MlpKernels kMlpHalfAmx[2];  // the second on the emulated unit

}  // namespace microtome::cpu
