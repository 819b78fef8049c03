// The loops over packed panels, compiled once per instruction set; simd.h has the rules of such files.
//
// Rows of x are packed in slivers of neighbouring rows, a sliver line by line: 64 bytes of its first row, of its second
// row, and so on, then the next 64 bytes of each. One line holds 16 float32 columns or 32 bfloat16 ones, which is also
// how AMX wants them: a tile is one line of sixteen rows.
//
// A Level has kRows and kGranule (panels.h) and
//     row_bytes(i), panel_bytes(i)
//     line_columns                                  columns of a line
//     pack(line, x, base, n)                        one line of one row from n columns, zero beyond; base may be null
//     multiply(count, rows, panel, i, ahead, sums)  sums [count][32] of a sliver and a panel
#pragma once

#include "common/panels.h"
#include "common/simd.h"

namespace microtome {
namespace {

constexpr int64_t kLine = 64;  // bytes

// Weights to ask for while a tile is computed: from `at` on, `step` bytes for each 128 bytes of the panel it reads.
struct Ahead {
    const char* at;
    int64_t step;
};

constexpr int64_t kStep = kPanelLanes * 4;  // bytes: one column of float32 weights, or two of bfloat16
constexpr int64_t kAheadBytes = 8192;       // how far ahead a panel is asked for by the tile that reads it

// out [n] = n columns of x less those of base. Lanes beyond n are zero.
inline vf difference(const float* x, const float* base, int64_t n) {
    if (n >= kWidth) return base ? sub(load(x), load(base)) : load(x);
    if (n <= 0) return zero();
    return base ? sub(load_n(x, n), load_n(base, n)) : load_n(x, n);
}

template <class Level>
void pack_sliver(const PanelProduct& p, int64_t row, int64_t count, char* out) {
    for (int64_t r = 0; r < count; ++r) {
        const int64_t from = p.x_base ? p.index[row + r] : 0;
        const float* x = p.x + (row + r) * p.x_stride;
        const float* base = p.x_base ? p.x_base + from * p.x_base_stride : nullptr;
        char* line = out + r * kLine;
        const int64_t lines = Level::row_bytes(p.i) / kLine;
        for (int64_t c = 0; c < lines; ++c, line += count * kLine) {
            const int64_t at = c * Level::line_columns;
            Level::pack(line, x + at, base ? base + at : nullptr, p.i - at);
        }
    }
}

// y = sums + y_base + bias + add for rows [row, row + count) and the panel's columns, added in this order.
inline void finish(const PanelProduct& p, int64_t row, int64_t count, int64_t column, const float* sums) {
    const int64_t columns = p.o - column < kPanelLanes ? p.o - column : kPanelLanes;
    for (int64_t r = row; r < row + count; ++r, sums += kPanelLanes) {
        const float* terms[3];
        int kinds = 0;
        if (p.y_base) terms[kinds++] = p.y_base + p.index[r] * p.y_base_stride + column;
        if (p.bias) terms[kinds++] = p.bias + column;
        if (p.add) terms[kinds++] = p.add + r * p.add_stride + column;
        float* y = p.y + r * p.o + column;
        int64_t c = 0;
        for (; c + kWidth <= columns; c += kWidth) {
            vf s = load(sums + c);
            for (int k = 0; k < kinds; ++k) s = add(s, load(terms[k] + c));
            store(y + c, s);
        }
        if (c == columns) continue;
        vf s = load(sums + c);
        for (int k = 0; k < kinds; ++k) s = add(s, load_n(terms[k] + c, columns - c));
        store_n(y + c, s, columns - c);
    }
}

template <class Level>
void run_level(const PanelProduct& p, int64_t r0, int64_t r1, int64_t p0, int64_t p1, int64_t block, char* scratch) {
    alignas(64) float sums[Level::kRows * kPanelLanes];
    const int64_t n = r1 - r0, blocks = (n + block - 1) / block, row_bytes = Level::row_bytes(p.i);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = r0 + part_start(n, b, blocks, Level::kGranule);
        const int64_t rows = r0 + part_start(n, b + 1, blocks, Level::kGranule) - first;
        const int64_t slivers = (rows + Level::kRows - 1) / Level::kRows;
        for (int64_t s = 0; s < slivers; ++s) {
            const int64_t at = part_start(rows, s, slivers, Level::kGranule);
            pack_sliver<Level>(p, first + at, part_start(rows, s + 1, slivers, Level::kGranule) - at,
                               scratch + at * row_bytes);
        }
        for (int64_t panel = p0; panel < p1; ++panel) {
            const char* weights = static_cast<const char*>(p.packed) + panel * Level::panel_bytes(p.i);
            // The tiles of a panel share the asking for the next one, so that memory is never waited for in one place:
            // 16 rows over weights that no cache holds run at 274 GF/s, where each tile asks for its own at 222 (Zen 5,
            // one thread, i 768, o 2304). One tile alone asks a little ahead of itself.
            const int64_t own = panel == p0 || slivers == 1;  // tiles that read weights not asked for yet
            Ahead ahead = {weights + kAheadBytes, kStep};
            for (int64_t s = 0; s < slivers; ++s) {
                const int64_t at = part_start(rows, s, slivers, Level::kGranule);
                const int64_t count = part_start(rows, s + 1, slivers, Level::kGranule) - at;
                const int64_t share = slivers - own;
                if (s == own) ahead = {weights + Level::panel_bytes(p.i), (kStep + share - 1) / share};
                Level::multiply(count, scratch + at * row_bytes, weights, p.i, ahead, sums);
                finish(p, first + at, count, panel * kPanelLanes, sums);
            }
        }
    }
}

template <class Level>
constexpr PanelKernels kPanelKernels = {Level::kRows, Level::kGranule, Level::row_bytes, run_level<Level>};

}  // namespace
}  // namespace microtome
