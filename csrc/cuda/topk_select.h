// From candidate lists to the k best of every row. Letters: n rows, d model width, f features, k active.
#pragma once

#include <cstdint>

namespace microtome::cuda {

// value[row, i] = bias[g] + sum_c (x[row, c] - center[c]) W[g, c] for each listed g = index[row, i], in float32; the
// sum depends on d and on nothing else. x, W, bias and center are bf16 where `half`, else float32; bias and center may
// be 0. With `all`, index is written first: feature i at place i.
void candidate_values(bool half, uintptr_t x, uintptr_t W, uintptr_t bias, uintptr_t center, uintptr_t count,
                      uintptr_t index, uintptr_t value, int64_t n, int64_t d, int64_t capacity, bool all,
                      uintptr_t stream);

// The widest rows that candidate_values takes, and the largest k of select_candidates.
constexpr int64_t kWidest = 49152, kMostActive = 8192;

// The k best of each row's candidates, value descending, then index ascending (-0.0 equals 0.0), to values (bf16 where
// `half`) and indices; places beyond a short list get -inf and -1. candidates[row] = count[row]. Rows that have fewer
// than k candidates at or above theta, or more than the capacity, are appended to `failed`. The candidates of a row
// differ in their index, none is NaN.
// With `listed`, only rows that `failed` names are answered, and their candidates[row] = f.
void select_candidates(bool half, uintptr_t theta, uintptr_t count, uintptr_t index, uintptr_t value, uintptr_t failed,
                       uintptr_t failures, uintptr_t values, uintptr_t indices, uintptr_t candidates, int64_t n,
                       int64_t k, int64_t f, int64_t capacity, bool listed, uintptr_t stream);

}  // namespace microtome::cuda
