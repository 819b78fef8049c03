// Tiles of a few rows by 32 columns by multiply-add in vector registers: sums of float32 products, in column order.
// The sums of kBlock columns are added up on their own and then to the total, which keeps the error of a long sum near
// that of a BLAS; the order is the same on every level, so levels that have fma give the same bits.
#pragma once

#include "common/panel_kernel.h"

namespace microtome {
namespace {

// Registers: kTileRows x 2 sums, 2 vectors of weights, 1 broadcast.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileWidth = 2 * kWidth;  // columns of a tile: the panel's 32, or a half or quarter of them
constexpr int64_t kBlock = 256;         // columns of x, a multiple of 32
constexpr int64_t kAhead = 16;          // lines of weights asked for before they are needed

// The weights of one step of a tile and how they meet x. Panels of float32 ...
struct FloatPanel {
    static constexpr int kColumns = 1;  // columns of x a step takes
    static constexpr int64_t kStep = kPanelLanes * 4;
    static inline void read(const char* panel, vf (&w)[1][2]) {
        const float* at = reinterpret_cast<const float*>(panel);
        w[0][0] = load(at);
        w[0][1] = load(at + kWidth);
    }
};

// One block of columns: sums [R][32] (one tile's columns of them) = or += the products.
template <int R, class Panel>
void multiply_block(const char* lines, const char* panel, int64_t columns, bool fresh, float* sums) {
    constexpr int kColumns = Panel::kColumns;
    vf s[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) s[r][0] = s[r][1] = zero();
    for (int64_t c = 0; c < columns; c += 16, lines += R * kLine) {
        const int64_t steps = columns - c < 16 ? columns - c : 16;
        const float* x = reinterpret_cast<const float*>(lines);
        for (int64_t j = 0; j < steps; j += kColumns, x += kColumns, panel += Panel::kStep) {
            vf w[kColumns][2];
            Panel::read(panel, w);
            __builtin_prefetch(panel + kAhead * Panel::kStep);
            __builtin_prefetch(panel + kAhead * Panel::kStep + kLine);
#pragma GCC unroll 2
            for (int e = 0; e < kColumns; ++e) {
#pragma GCC unroll 14
                for (int r = 0; r < R; ++r) {
                    const vf a = set1(x[r * 16 + e]);
                    s[r][0] = fma(a, w[e][0], s[r][0]);
                    s[r][1] = fma(a, w[e][1], s[r][1]);
                }
            }
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) {
        float* at = sums + r * kPanelLanes;
        store(at, fresh ? s[r][0] : add(load(at), s[r][0]));
        store(at + kWidth, fresh ? s[r][1] : add(load(at + kWidth), s[r][1]));
    }
}

template <int R, class Panel>
inline void multiply_rows(const char* lines, const char* panel, int64_t i, float* sums) {
    if (i == 0) std::memset(sums, 0, R * kPanelLanes * sizeof(float));
    for (int64_t c = 0; c < i; c += kBlock) {
        const int64_t columns = i - c < kBlock ? i - c : kBlock;
        for (int half = 0; half < kPanelLanes / kTileWidth; ++half) {
            multiply_block<R, Panel>(lines + c * R * 4,
                                     panel + c / Panel::kColumns * Panel::kStep + half * kTileWidth * 4, columns,
                                     c == 0, sums + half * kTileWidth);
        }
    }
}

// The instance for `count` rows; slivers are cut evenly, so every count occurs.
template <class Panel, int R = kTileRows>
inline void multiply_any(int64_t count, const char* lines, const char* panel, int64_t i, float* sums) {
    if constexpr (R > 0) {
        if (count == R) return multiply_rows<R, Panel>(lines, panel, i, sums);
        multiply_any<Panel, R - 1>(count, lines, panel, i, sums);
    }
}

}  // namespace
}  // namespace microtome
