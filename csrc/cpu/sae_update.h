// One optimizer step of an SAE in one pass over its parameters. What the files of each instruction set share.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace microtome::cpu {

constexpr int64_t kChunk = 256;  // entries of one latent summed in one go; longer segments are split

enum class Rule : int { kAdam = 0, kSgd = 1, kSign = 2 };

// The rule's numbers, folded for one step. Adam and AdamW differ only in l2 and shrink.
struct Step {
    Rule rule;
    float l2;      // added to the gradient times p
    float shrink;  // p is multiplied by it first
    float beta1, rest1, beta2, rest2;
    float inverse_correction;  // 1 / sqrt(1 - beta2^step)
    float eps;
    float lr;  // over 1 - beta1^step for Adam
};

// One (row, latent) pair of a code, in the order of its latent.
struct Entry {
    int32_t row;
    int32_t aux;  // 1 where the row of the aux code's grad_out is meant
    float value;
    float grad;
};

struct Moments {
    float* m;
    float* v;
};

// Everything the pass over the features reads and writes.
struct Pass {
    int64_t d;
    const float* x;
    const float* grad_out[2];
    const Entry* entries;
    const int64_t* offsets;  // [f + 1]
    const int32_t* partial;  // [f]: first partial sum of a long segment; null without one
    const float* partials;   // [., 2, d]
    float *W_enc, *b_enc, *W_dec;
    Moments enc, bias, dec;
    const int32_t* place;  // [f]: which row of the extra gradients is a latent's, or -1; null without any
    const float *extra_enc, *extra_bias, *extra_dec;
    float* db_enc;  // [f]
    int kind;       // of the shadow, or -1
    int64_t stride;
    int16_t* shadow;
    float* stats;
    bf16 *W_enc_bf16, *W_dec_bf16;  // copies of the new rows, or null
    Step weights, biases;           // biases do not decay
    bool rowsparse, project, renorm, center;
};

struct SaeUpdateKernels {
    // dec = sum value * grad_out[row], enc = sum grad * x[row] over the entries, in their order.
    void (*sum_entries)(const Pass&, const Entry* entries, int64_t count, float* dec, float* enc);
    // out = sum of `count` rows.
    void (*sum_rows)(const float* rows, int64_t count, int64_t d, float* out);
    // Features [begin, end); into `encoder_part` go their -db_enc[g] * W_enc[g]. scratch [2, d]. The first feature
    // whose new encoder row is not finite (seen only with a shadow), or -1.
    int64_t (*update_features)(const Pass&, int64_t begin, int64_t end, float* encoder_part, float* scratch);
    void (*update_vector)(const Step&, float* p, const float* grad, Moments, int64_t count);
};

extern const SaeUpdateKernels kSaeUpdateAvx2, kSaeUpdateAvx512;

// Addresses of contiguous tensors, 0 for None; the shapes are those of the op of this name. Returns the first feature
// whose new encoder row holds NaN or infinity (seen only with a shadow), or -1. Scratch: 36 (n k + n a) + 20 f bytes,
// one [2, d] buffer for every 256 entries of a long segment, one [d] for every 16 rows, and at most 256 of [d].
int64_t sae_update(int64_t n, int64_t d, int64_t f, int64_t k, uintptr_t indices, int index_bytes, uintptr_t values,
                   uintptr_t grad_values, uintptr_t grad_out, double scale, int64_t a, uintptr_t aux_indices,
                   int aux_index_bytes, uintptr_t aux_values, uintptr_t aux_grad_values, uintptr_t aux_grad_out,
                   double aux_scale, uintptr_t x, uintptr_t W_enc, uintptr_t b_enc, uintptr_t W_dec, uintptr_t b_dec,
                   uintptr_t m_W_enc, uintptr_t v_W_enc, uintptr_t m_b_enc, uintptr_t v_b_enc, uintptr_t m_W_dec,
                   uintptr_t v_W_dec, uintptr_t m_b_dec, uintptr_t v_b_dec, int kind, int64_t stride, uintptr_t shadow,
                   uintptr_t stats, uintptr_t W_enc_bf16, uintptr_t W_dec_bf16, uintptr_t place, uintptr_t extra_enc,
                   uintptr_t extra_bias, uintptr_t extra_dec, const char* optimizer, double lr, double beta1,
                   double beta2, double eps, double weight_decay, int64_t step, bool rowsparse, bool project,
                   bool renorm, bool center, uintptr_t fired, const char* isa, int threads);

}  // namespace microtome::cpu
