// Shadow and error bounds of a whole encoder; see screen_row.h.
#pragma once

#include <cstdint>

namespace microtome::cpu {

// The first row in [begin, end) that holds NaN or infinity, or -1. All rows are written.
using ScreenRows = int64_t (*)(const float* W, int64_t begin, int64_t end, int64_t d, int64_t stride, int kind,
                               int16_t* shadow, float* stats);
extern const ScreenRows kScreenRowsAvx2, kScreenRowsAvx512;

// W [f, d], shadow [f, stride] int16, stats [f, 4], all contiguous. True when every row is finite.
bool screen_weights(uintptr_t W, int64_t f, int64_t d, int64_t stride, int kind, uintptr_t shadow, uintptr_t stats,
                    const char* isa, int threads);

}  // namespace microtome::cpu
