// delta_linear by vdpbf16ps: two bfloat16 products a lane and instruction, twice the rate of float32.
#pragma once

#include "common/panel_fma.h"
#include "cpu/delta_linear_kernel.h"

namespace microtome::cpu {
namespace {

// A step holds the weights of two columns, and an entry of a row of x is a pair as well.
struct PairPanel : FloatPanel {
    static inline vf multiply_add(vf x, vf w, vf sum) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
    }
};

struct Pairs {
    static constexpr int64_t kRows = kTileRows, kGranule = 1, line_columns = kLineColumns;
    static int64_t row_bytes(int64_t i) { return lines_of(i) * kLine; }
    static int64_t panel_bytes(int64_t i) { return bf16_panel_bytes(i); }
    static void pack(char* line, const float* x, const float* base, int64_t n) { pack_bf16_line(line, x, base, n); }
    static void multiply(int64_t count, const char* lines, const char* panel, int64_t i, Ahead& ahead, float* sums) {
        multiply_any<PairPanel>(count, lines, panel, lines_of(i) * (kLineColumns / 2), ahead, sums);
    }
};

}  // namespace
}  // namespace microtome::cpu
