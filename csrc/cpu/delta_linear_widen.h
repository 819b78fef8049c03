// delta_linear where there is no bfloat16 product: differences are rounded and kept as float32, weights are widened as
// they are read, and products are float32 multiply-adds.
#pragma once

#include "common/panel_fma.h"
#include "cpu/delta_linear_kernel.h"

namespace microtome::cpu {
namespace {

typedef uint32_t bits_of_vf __attribute__((vector_size(sizeof(vf))));

// A step holds the weights of two columns, pair by pair.
struct WidenPanel {
    static constexpr int kEntries = 2;
    static inline vf read(const char* panel, int entry) {
        const auto pairs = reinterpret_cast<bits_of_vf>(load(reinterpret_cast<const float*>(panel)));
        return reinterpret_cast<vf>(entry ? pairs & 0xffff0000u : pairs << 16);
    }
    static inline vf multiply_add(vf x, vf w, vf sum) { return fma(x, w, sum); }
};

struct Widened {
    static constexpr int64_t kRows = kTileRows, kGranule = 1, line_columns = 16;
    static int64_t row_bytes(int64_t i) { return lines_of(i) * 2 * kLine; }
    static int64_t panel_bytes(int64_t i) { return bf16_panel_bytes(i); }
    static void pack(char* line, const float* x, const float* base, int64_t n) {
        bf16 rounded[16];
        float* out = reinterpret_cast<float*>(line);
        for (int c = 0; c < 16; c += kWidth) {
            store(rounded + c, difference(x + c, base ? base + c : nullptr, n - c));
            store(out + c, load(rounded + c));
        }
    }
    static void multiply(int64_t count, const char* lines, const char* panel, int64_t i, Ahead& ahead, float* sums) {
        multiply_any<WidenPanel>(count, lines, panel, lines_of(i) * kLineColumns, ahead, sums);
    }
};

}  // namespace
}  // namespace microtome::cpu
