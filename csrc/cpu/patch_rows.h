// Many patched runs joined to base runs from one table.
#pragma once

#include <cstdint>
#include <utility>

namespace microtome::cpu {

struct PatchArguments {
    const float* base;  // [b, t, w], strides of example and token
    int64_t example, token;
    const float* sources;  // [S, w_s], stride of a row
    int64_t source;
    const int32_t *rows, *table;  // [n, 3], [m, 6], contiguous
    const float* factors;         // [m]
    int64_t total, n, m, b, t, w, S, w_s;
    float* out;  // [total, w]
};

// What is wrong with the tables, by its code in python/microtome/ops/patch_rows.py, and the row or entry it is wrong
// at. {0, 0} when all is well; else nothing has been written.
std::pair<int64_t, int64_t> patch_rows(const PatchArguments& a, int threads);

}  // namespace microtome::cpu
