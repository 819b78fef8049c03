// The k largest pre-activations of every row without forming the [n, f] matrix. See docs/exactness.md for the proof.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace microtome::cpu {

constexpr int kPanel = 16;  // rows of x that are packed side by side

// A feature that may still belong to a row's top k, with proven bounds on its float32 pre-activation.
struct Hit {
    float upper, lower;
    int32_t index;
};

// What a screening kernel reads and writes. Rows are counted from the start of a pass; `slots` are rows times feature
// slices, so that threads which share a row each have their own list.
struct Screening {
    // The features: 16-bit codes with statistics {scale, |w|, |w - shadow|, -}, or float32 weights.
    const int16_t* shadow;
    const float* stats;
    int64_t stride;
    const float* weights;
    const float* bias;  // [f] or null
    int64_t first_feature;

    // The rows: packed codes [panel][pair of columns][16 rows][2], or float32 rows, and the bound's row factors.
    const int16_t* packed;
    const float* x;
    int64_t d, padded;
    const float* scale;    // [rows]
    const float* error_w;  // [rows] multiplies |w|
    const float* error_r;  // [rows] multiplies |w - shadow|
    float tiny;            // added to every bound: what numbers below the smallest normal one lose

    // The lists: per row a threshold no top-k member's upper bound lies below, and its hits.
    float* threshold;
    Hit* hits;
    int32_t* count;
    int32_t* limit;
    int64_t capacity;
    int64_t k;
    float* scratch;  // [capacity + kPanel], this thread's
};

// Screens features [f0, f1), counted from first_feature, against rows [r0, r1); r0 is a multiple of `Kernel::rows`.
using ScreenFunction = void (*)(const Screening&, int64_t f0, int64_t f1, int64_t r0, int64_t r1);

// <x, w> for m features of one row, in the sixteen-lane order of common/simd.h.
using RescoreFunction = void (*)(const float* x, const float* weights, int64_t d, const Hit* hits, int64_t m,
                                 const float* bias, float* values);

// Reorders n hits: first the k with the largest lower bounds, then the others that may belong to the k; returns how
// many those are together. k of them are known to reach `floor`; `scratch` has room for n + kPanel floats.
using BestFunction = int64_t (*)(Hit* hits, int64_t n, int64_t k, float floor, float* scratch);

struct TopkKernels {
    ScreenFunction screen;  // null: this level does not screen
    int screen_rows;        // rows a screening call handles together
    int kind;               // code of the shadow it needs: 0 bf16, 1 q15
    ScreenFunction exact;   // float32 for every feature
    RescoreFunction rescore;
    BestFunction best;  // null where nothing is screened
    bool (*screen_row)(const float* w, int64_t d, int64_t stride, int kind, int16_t* shadow, float* stats);
};

extern const TopkKernels topk_generic, topk_avx2, topk_avx512;
extern const TopkKernels topk_amx[2];  // the second on the emulated unit

// Called by the float32 kernels when a row's list is full.
void prune_exact(const Screening& s, int64_t row);

struct TopkArguments {
    const float* x;
    int64_t x_stride;
    const float* weights;
    const float* bias;
    const float* center;  // b_dec or null
    int64_t n, d, f, k;
    bool fast;
    const int16_t* shadow;  // null: converted block by block
    const float* stats;
    int64_t stride;
    float* values;
    int32_t* indices;
    int32_t* candidates;
    int64_t* bad_row;      // first row of x that is not finite or overflows, else -1
    int64_t* bad_feature;  // first row of W_enc or entry of b_enc that is not finite, else -1
    int threads;
};

void topk_encode(const TopkArguments& a, Isa isa);

// 0 for bf16, 1 for q15: the shadow that a level screens with.
int screen_kind(Isa isa);

}  // namespace microtome::cpu
