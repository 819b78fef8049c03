// delta_linear on a unit that multiplies tiles, as AMX does: 16 rows of 32 bfloat16 columns times 16 pairs of columns
// for 16 outputs. Two tiles of rows meet the two halves of a panel, so each tile that is loaded is used twice.
//
// A Unit (common/amx.h, delta_linear_plain.h) has
//     zero<c>()                        tile c of sums, c in 0..3
//     load<t>(from, stride)            tile t in 4..7: sixteen lines of 64 bytes, `stride` bytes apart
//     multiply<c, rows, weights>()     tile c += tile `rows` (4, 5) times tile `weights` (6, 7)
//     store<c>(to, stride)             sixteen lines of sixteen float32 sums
#pragma once

#include "cpu/delta_linear_kernel.h"

namespace microtome::cpu {
namespace {

template <class Unit>
struct Tiles {
    static constexpr int64_t kRows = 32, kGranule = 16, line_columns = kLineColumns;
    static int64_t row_bytes(int64_t i) { return lines_of(i) * kLine; }
    static int64_t panel_bytes(int64_t i) { return bf16_panel_bytes(i); }
    static void pack(char* line, const float* x, const float* base, int64_t n) { pack_bf16_line(line, x, base, n); }

    // Sums beyond `count` rows are of whatever follows a line's last row, and are not read.
    static void multiply(int64_t count, const char* lines, const char* panel, int64_t i, Ahead& ahead, float* sums) {
        if (count > 16) {
            multiply_rows<true>(count, lines, panel, i, ahead, sums);
        } else {
            multiply_rows<false>(count, lines, panel, i, ahead, sums);
        }
    }

  private:
    template <bool kTwo>
    static inline void multiply_rows(int64_t count, const char* lines, const char* panel, int64_t i, Ahead& ahead,
                                     float* sums) {
        Unit unit;
        unit.template zero<0>();
        unit.template zero<1>();
        if (kTwo) unit.template zero<2>();
        if (kTwo) unit.template zero<3>();
        const int64_t end = lines_of(i);
        for (int64_t c = 0; c < end; ++c, lines += count * kLine, panel += kLineColumns / 2 * kPairBytes) {
            const int64_t asked = kLineColumns / 2 * ahead.step;
            for (int64_t k = 0; k < asked; k += kLine) __builtin_prefetch(ahead.at + k);
            ahead.at += asked;
            unit.template load<4>(lines, kLine);
            unit.template load<6>(panel, kPairBytes);
            unit.template multiply<0, 4, 6>();
            unit.template load<7>(panel + kPairBytes / 2, kPairBytes);
            unit.template multiply<1, 4, 7>();
            if (!kTwo) continue;
            unit.template load<5>(lines + 16 * kLine, kLine);
            unit.template multiply<2, 5, 6>();
            unit.template multiply<3, 5, 7>();
        }
        constexpr int64_t kStride = kPanelLanes * sizeof(float);
        unit.template store<0>(sums, kStride);
        unit.template store<1>(sums + 16, kStride);
        if (!kTwo) return;
        unit.template store<2>(sums + 16 * kPanelLanes, kStride);
        unit.template store<3>(sums + 16 * kPanelLanes + 16, kStride);
    }
};

}  // namespace
}  // namespace microtome::cpu
