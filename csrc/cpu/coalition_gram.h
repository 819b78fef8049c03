// coalition_gram: the normal equations of a weighted regression on coalitions, from their bits.
//
// Players go by groups of 32, half a word. A group of rows keeps a table: for each four of its players and each of the
// 16 ways in which they can be in a coalition, the sum of what such coalitions bring to a row. A coalition is then
// eight additions of a row, whatever is in it; the row of one player is the sum of the eight entries that hold him.
#pragma once

#include <cstdint>
#include <string>

namespace microtome::cpu {

constexpr int64_t kGroup = 32;           // players, and columns of a table
constexpr int64_t kTile = 32 * 32;       // numbers of a Gram tile: rows of one group by columns of another
constexpr int64_t kTable = 8 * 16 * 32;  // numbers of a table
constexpr int64_t kPacked = 64;          // coalitions whose products with the values are packed at a time

struct CoalitionGram {
    const uint64_t* coalitions;      // [K, w]
    const double *weights, *values;  // [g, K], [e, K, o]
    int64_t K, w, g, e, o, p;
    double *gram, *moments;  // [g, p + 1, p + 1], [e, p + 1, o]
};

// Addresses of contiguous tensors. The same bits for every number of threads and on every level.
void coalition_gram(uintptr_t coalitions, uintptr_t weights, uintptr_t values, int64_t K, int64_t w, int64_t g,
                    int64_t e, int64_t o, int64_t p, uintptr_t gram, uintptr_t moments, const std::string& isa,
                    int threads);

// One instruction set's kernels over coalitions [begin, end).
struct CoalitionGramKernels {
    // tile [32, 32] = sum_k w_k z_row z_column^T of two groups, column <= row; where they are one group, only its lower
    // half. `table` holds kTable numbers.
    void (*tile)(const CoalitionGram& a, int64_t weighting, int64_t row, int64_t column, int64_t begin, int64_t end,
                 double* table, double* tile);
    // sums [1 + 32 * groups, 32] = sum_k z (w_k values_k)^T for columns [first, first + count) of the e * o, at most
    // 32. `scratch` holds kTable * groups + kPacked * 32 numbers.
    void (*moments)(const CoalitionGram& a, int64_t first, int64_t count, int64_t begin, int64_t end, double* scratch,
                    double* sums);
};

extern const CoalitionGramKernels kCoalitionGramAvx2, kCoalitionGramAvx512;

}  // namespace microtome::cpu
