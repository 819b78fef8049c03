// packed_linear on one instruction set.
#pragma once

#include "common/panel_fma.h"
#include "cpu/packed_linear.h"

namespace microtome::cpu {
namespace {

struct Float32 {
    static constexpr int64_t kRows = kTileRows, kGranule = 1, line_columns = 16;
    static int64_t row_bytes(int64_t i) { return (i + 15) / 16 * kLine; }
    static int64_t panel_bytes(int64_t i) { return i * kStep; }
    static void pack(char* line, const float* x, const float* base, int64_t n) {
        float* out = reinterpret_cast<float*>(line);
        for (int c = 0; c < 16; c += kWidth) store(out + c, difference(x + c, base ? base + c : nullptr, n - c));
    }
    static void multiply(int64_t count, const char* lines, const char* panel, int64_t i, Ahead& ahead, float* sums) {
        multiply_any<FloatPanel>(count, lines, panel, i, ahead, sums);
    }
};

}  // namespace
}  // namespace microtome::cpu
