// coalition_inputs: a span of an order of the players says which columns of a row come from the explicand.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace microtome::cpu {

struct CoalitionInputs {
    const void* x;  // [e, m], items between rows
    int64_t x_stride;
    const void* background;  // [n, m], items between rows
    int64_t background_stride;
    const int32_t* ranks;   // [q, p]
    const int32_t* rows;    // [R, 5]: explicand, background, order, lo, hi
    const int32_t* player;  // [m], -1 for a column of the explicand; null: column c is player c
    int64_t e, n, q, p, m;
    void* out;  // [R, m]
};

// What is wrong, by its code in python/microtome/ops/coalition_inputs.py, and the row or column that it is wrong at.
struct CoalitionProblem {
    int64_t code, at;
};

// Items of `size` bytes, 1, 2, 4 or 8. {0, 0} when all is well; else `out` holds nothing of use, and the first row in
// the table (or column of `player`) that reaches outside is named.
std::pair<int64_t, int64_t> coalition_inputs(const CoalitionInputs& a, int64_t R, int64_t size, const std::string& isa,
                                             int threads);

// One instruction set's kernels, by the binary logarithm of the item's size: rows [begin, end), up to the first that
// reaches outside.
struct CoalitionKernels {
    CoalitionProblem (*fill[4])(const CoalitionInputs& a, int64_t begin, int64_t end);
};

extern const CoalitionKernels kCoalitionAvx2, kCoalitionAvx512;

}  // namespace microtome::cpu
