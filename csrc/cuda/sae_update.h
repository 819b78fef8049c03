// One optimizer step of an SAE on the GPU. Letters: n rows, d model width, f features, k active; m entries in all.
//
// Entries are sorted by latent. A segment longer than kChunk has its full chunks summed first, each by itself; the
// latent's block adds those sums in order, then the other entries. Every sum runs in an order that the offsets, d and f
// alone decide.
#pragma once

#include <cstdint>

namespace microtome::cuda {

constexpr int64_t kChunk = 128;           // entries summed in sequence
constexpr int64_t kWidestUpdate = 16384;  // columns whose gradient fits the registers of a block
constexpr int64_t kWidestOdd = 8192;      // where rows do not start at multiples of 16 bytes
constexpr int64_t kPrograms = 4096;       // blocks at most; each sums its latents' share of b_dec's gradient

// Blocks of sae_update for f latents, each with as many turns: rows of `centre`.
int64_t update_programs(int64_t f);

// Rows: x and what a code holds, all float32 or all bf16; they are widened as they are read.
struct Code {
    uintptr_t values, grad_values;  // [n, k]
    uintptr_t grad_out;             // [n, d]
    int64_t k;
    float scale;
};

// What becomes of the entries once they are sorted; all device addresses.
struct Entries {
    uintptr_t latents;              // [m] int32, ascending
    uintptr_t order;                // [m] int64, the entry at each sorted place; from n k on they are the aux code's
    uintptr_t weight, grad_weight;  // [m] float32: scale * value and scale * grad_value
    uintptr_t source;               // [m] int32: the row, or n plus the aux code's row
    uintptr_t flags;                // [m] uint8: 1 of the main code and above zero, 2 not zero
    uintptr_t offsets;              // [f + 1] int32
    uintptr_t bias_grad;            // [f] float32, sum of grad_weight
    uintptr_t fired, touched;       // [f] int32: how many have flag 1; whether any has flag 2
    uintptr_t dec_partial, enc_partial;  // [ceil(m / kChunk), d] float32
    int64_t m, n, d, f;
    bool narrow;  // the rows are bf16
};

// Write weight to touched from latents and order, then the sums of full chunks.
void sort_entries(const Entries& e, const Code& code, const Code& aux, uintptr_t x, uintptr_t stream);

struct Rule {
    bool adam, sign, momentum;
    float lr, beta1, rest1, beta2, rest2, eps;  // lr holds Adam's 1 / (1 - beta1^t); rest = 1 - beta
    float decay, shrink;                        // L2; 1 - lr * decoupled decay
    float inverse_root;                         // 1 / sqrt(1 - beta2^t)
};

struct State {
    uintptr_t p, m, v;  // m and v are 0 where the rule keeps none
};

struct Update {
    State W_enc, b_enc, W_dec, b_dec;
    uintptr_t shadow, stats;  // [f, stride] bf16 and [f, 4] float32, or 0
    int64_t stride;
    uintptr_t W_enc_bf16, W_dec_bf16;  // copies [f, d] of the new weights, or 0
    uintptr_t centre;                  // [update_programs(f), d] float32, or 0: the encoder's input was not centred
    uintptr_t verdict;                 // [1] float32, or 0; where it is not 0, an input is wrong and nothing is written
    bool rowsparse, project, renorm;
};

void sae_update(const Entries& e, const Code& code, const Code& aux, uintptr_t x, const Rule& rule, const Update& u,
                uintptr_t stream);

}  // namespace microtome::cuda
