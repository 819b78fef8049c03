// Rows of an encoder to their shadows. Included once per instruction set.
#pragma once

#include "cpu/screen_row.h"
#include "cpu/screen_weights.h"

namespace microtome::cpu {
namespace {

int64_t screen_rows(const float* W, int64_t begin, int64_t end, int64_t d, int64_t stride, int kind, int16_t* shadow,
                    float* stats) {
    int64_t bad = -1;
    for (int64_t g = begin; g < end; ++g) {
        const bool finite = screen_row(W + g * d, d, stride, kind, shadow + g * stride, stats + g * 4);
        if (!finite && bad < 0) bad = g;
    }
    return bad;
}

}  // namespace
}  // namespace microtome::cpu
