// Screening in 16-bit integers with vpdpwssd: 32 products a lane-wide instruction, exact sums.
#include "cpu/screen_row.h"
#include "cpu/topk_encode_exact.h"
#include "cpu/topk_encode_screen.h"

namespace microtome::cpu {
namespace {

constexpr int kFeatures = 12;      // 12 x 2 accumulators, 2 vectors of x, 1 broadcast of 32 registers
constexpr int kRows = 2 * kPanel;  // two panels side by side

// Integer dot products of twelve features with two panels of rows. The sums live in a local array that only constants
// index, or the compiler would keep them in memory.
inline void tile(const int16_t* w, int64_t stride, const int16_t* x, int64_t padded, float (&out)[kFeatures][kRows]) {
    const int16_t* second = x + kPanel * padded;
    __m512i acc[kFeatures][2];
#pragma GCC unroll 12
    for (int g = 0; g < kFeatures; ++g) acc[g][0] = acc[g][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < padded; i += 2) {
        const __m512i x0 = _mm512_load_si512(x + i * kPanel);
        const __m512i x1 = _mm512_load_si512(second + i * kPanel);
#pragma GCC unroll 12
        for (int g = 0; g < kFeatures; ++g) {
            int32_t pair;
            std::memcpy(&pair, w + g * stride + i, sizeof pair);
            const __m512i b = _mm512_set1_epi32(pair);
            acc[g][0] = _mm512_dpwssd_epi32(acc[g][0], b, x0);
            acc[g][1] = _mm512_dpwssd_epi32(acc[g][1], b, x1);
            // Keeps the compiler from starting all features at once, which would spill the accumulators.
            asm volatile("" : "+v"(acc[g][0]), "+v"(acc[g][1]));
        }
    }
#pragma GCC unroll 12
    for (int g = 0; g < kFeatures; ++g) {
        store(out[g], _mm512_cvtepi32_ps(acc[g][0]));
        store(out[g] + kPanel, _mm512_cvtepi32_ps(acc[g][1]));
    }
}

void screen(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1) {
    screen_tiles<kFeatures, kRows>(s, f0, f1, r0, r1, tile);
}

}  // namespace

const TopkKernels topk_avx512 = {screen, kRows, 1, screen_exact, rescore, best_first, screen_row};

}  // namespace microtome::cpu
