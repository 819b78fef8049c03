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
constexpr int64_t kBlock = 256;         // entries of a row that are summed on their own, a multiple of 32

// How the weights of one step meet x; kEntries entries of a row of x go into it. Panels of float32:
struct FloatPanel {
    static constexpr int kEntries = 1;
    static inline vf read(const char* panel, int /*entry*/) { return load(reinterpret_cast<const float*>(panel)); }
    static inline vf multiply_add(vf x, vf w, vf sum) { return fma(x, w, sum); }
};

// `entries` entries of each row, four bytes each: sums [R][32] (one tile's columns of them) = or += the products.
// A function of its own: inlined into a large one, gcc 12 kept the sums in memory, at half the speed.
template <int R, class Panel>
__attribute__((noinline)) void multiply_block(const char* lines, const char* panel, int64_t entries, bool fresh,
                                              Ahead& ahead, float* sums) {
    constexpr int kEntries = Panel::kEntries;
    vf s[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) s[r][0] = s[r][1] = zero();
    for (int64_t c = 0; c < entries; c += 16, lines += R * kLine) {
        const int64_t steps = entries - c < 16 ? entries - c : 16;
        const float* x = reinterpret_cast<const float*>(lines);
        for (int64_t j = 0; j < steps; j += kEntries, x += kEntries, panel += kStep, ahead.at += ahead.step) {
            __builtin_prefetch(ahead.at);
            __builtin_prefetch(ahead.at + kLine);
#pragma GCC unroll 2
            for (int e = 0; e < kEntries; ++e) {
                const vf left = Panel::read(panel, e), right = Panel::read(panel + kWidth * 4, e);
#pragma GCC unroll 14
                for (int r = 0; r < R; ++r) {
                    const vf a = set1(x[r * 16 + e]);
                    s[r][0] = Panel::multiply_add(a, left, s[r][0]);
                    s[r][1] = Panel::multiply_add(a, right, s[r][1]);
                    // Keeps the compiler from starting all rows at once, which would spill sums.
#if defined(__AVX512F__)
                    asm volatile("" : "+v"(s[r][0]), "+v"(s[r][1]));
#elif defined(__AVX2__)
                    asm volatile("" : "+x"(s[r][0]), "+x"(s[r][1]));
#endif
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
inline void multiply_rows(const char* lines, const char* panel, int64_t i, Ahead& ahead, float* sums) {
    if (i == 0) std::memset(sums, 0, R * kPanelLanes * sizeof(float));
    Ahead nothing = {panel, 0};
    for (int64_t c = 0; c < i; c += kBlock) {
        const int64_t entries = i - c < kBlock ? i - c : kBlock;
        for (int half = 0; half < kPanelLanes / kTileWidth; ++half) {
            multiply_block<R, Panel>(lines + c * R * 4, panel + c / Panel::kEntries * kStep + half * kTileWidth * 4,
                                     entries, c == 0, half ? nothing : ahead, sums + half * kTileWidth);
        }
    }
}

// The instance for `count` rows; slivers are cut evenly, so every count occurs.
template <class Panel, int R = kTileRows>
inline void multiply_any(int64_t count, const char* lines, const char* panel, int64_t i, Ahead& ahead, float* sums) {
    if constexpr (R > 0) {
        if (count == R) return multiply_rows<R, Panel>(lines, panel, i, ahead, sums);
        multiply_any<Panel, R - 1>(count, lines, panel, i, ahead, sums);
    }
}

}  // namespace
}  // namespace microtome
