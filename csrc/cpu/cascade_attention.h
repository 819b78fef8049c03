// Attention of ragged rows over a shared prefix of keys and their own, and the repair of one changed key.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace microtome::cpu {

// Element c of head g of token x of example e lies at data + e * example + x * token + g * head + c.
struct Heads {
    const float* data;
    int64_t example, token, head;
};

struct CascadeArguments {
    Heads q, k, v, k_base, v_base;  // packed [Tq, h, dh], [T, hk, dh], [T, hk, dv]; base [b, t, hk, dh | dv]
    const int32_t *rows, *q_positions, *first;  // [n, 6], [Tq], [b]
    int64_t Tq, T, n, b, t, h, hk, dh, dv, window;
    float scale, softcap;
    float *z, *lse;  // [Tq, h, dv], [Tq, h]
};

struct SwapArguments {
    Heads z, lse, q, k_base, v_base;  // [b, t, h | hk, ...]; lse's `head` is the stride between heads
    Heads q_new, k_new, v_new;        // [n, h | hk, ...], a row is a token
    const int32_t *rows, *first;      // [n, 3], [b]
    int64_t total, n, b, t, h, hk, dh, dv, window;
    float scale, softcap;
    float* out;  // [total, h, dv]
};

// What is wrong with an index table, by its code in python/microtome/ops/_attention_rows.py, and the row or query it is
// wrong at. {0, 0} when all is well; else nothing has been written.
using Problem = std::pair<int64_t, int64_t>;

Problem cascade_attention(const CascadeArguments& a, const std::string& isa, int threads);
Problem swap_key_attention(const SwapArguments& a, const std::string& isa, int threads);

// The keys or queries of a base run, transposed: panel p of head g of example e holds tokens 16 p .. 16 p + 15 as
// [dh, 16], at data + (offset[e] * heads + g * count[e] + p - low[e]) * dh * 16.
struct BasePanels {
    float* data;
    const int64_t *offset, *low, *count;  // [b], in panels
};

// Pairs (query, query head of one key head) begin .. end - 1 of a row: pair i is query i / group, head i % group.
struct Piece {
    int64_t row, begin, end;
};

struct AttentionKernels {
    // One panel of all `heads` heads; scratch [width].
    void (*pack)(const Heads& from, int64_t tokens, int64_t heads, int64_t width, const BasePanels& to, int64_t example,
                 int64_t panel, float* scratch);
    int64_t (*scratch)(int64_t dh, int64_t dv);  // floats that attend and swap need
    void (*attend)(const CascadeArguments& a, const BasePanels& keys, const Piece& piece, const Piece* next,
                   int64_t key_head, float* scratch);
    // The tokens of one row, from place `token` of the answer on.
    void (*swap)(const SwapArguments& a, const BasePanels& keys, const BasePanels& queries, int64_t row,
                 int64_t key_head, int64_t token, float* scratch);
};

extern const AttentionKernels kAttentionAvx2, kAttentionAvx512;

}  // namespace microtome::cpu
