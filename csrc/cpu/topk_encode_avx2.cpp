// Screening in 16-bit integers: vpmaddwd multiplies twice as many pairs a cycle as an fp32 fma, and the sums are exact.
#include "cpu/screen_row.h"
#include "cpu/topk_encode_exact.h"
#include "cpu/topk_encode_screen.h"

namespace microtome::cpu {
namespace {

constexpr int kFeatures = 6;  // 6 x 2 accumulators, 2 vectors of x, 1 broadcast, 1 product: sixteen registers

// out[g][v] = integer dot products of feature g with rows 8 v ... 8 v + 7 of a panel. The sums live in a local array
// that only constants index, or the compiler would keep them in memory.
inline void tile(const int16_t* const (&w)[kFeatures], const int16_t* x, int64_t pairs, __m256i (&out)[kFeatures][2]) {
    __m256i acc[kFeatures][2];
#pragma GCC unroll 6
    for (int g = 0; g < kFeatures; ++g) acc[g][0] = acc[g][1] = _mm256_setzero_si256();
    for (int64_t p = 0; p < pairs; ++p) {
        const __m256i x0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + p * 32));
        const __m256i x1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + p * 32 + 16));
#pragma GCC unroll 6
        for (int g = 0; g < kFeatures; ++g) {
            int32_t pair;
            std::memcpy(&pair, w[g] + p * 2, sizeof pair);
            const __m256i b = _mm256_set1_epi32(pair);
            acc[g][0] = _mm256_add_epi32(acc[g][0], _mm256_madd_epi16(b, x0));
            acc[g][1] = _mm256_add_epi32(acc[g][1], _mm256_madd_epi16(b, x1));
            // Keeps the compiler from starting all six features at once, which would spill the accumulators.
            asm volatile("" : "+x"(acc[g][0]), "+x"(acc[g][1]));
        }
    }
#pragma GCC unroll 6
    for (int g = 0; g < kFeatures; ++g) {
        out[g][0] = acc[g][0];
        out[g][1] = acc[g][1];
    }
}

void screen(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1) {
    for (int64_t f = f0; f < f1; f += kFeatures) {
        const int16_t* w[kFeatures];  // past the end the last feature stands in, and is not looked at
        for (int g = 0; g < kFeatures; ++g) w[g] = s.shadow + (f + g < f1 ? f + g : f1 - 1) * s.stride;
        for (int64_t r = r0; r < r1; r += kPanel) {
            __m256i acc[kFeatures][2];
            tile(w, s.packed + r * s.padded, s.padded / 2, acc);
            for (int v = 0; v < 2; ++v) {
                const int64_t row = r + v * kWidth;
                const vf scale = load(s.scale + row), threshold = load(s.threshold + row);
                const vf error_w = load(s.error_w + row), error_r = load(s.error_r + row);
                for (int g = 0; g < kFeatures && f + g < f1; ++g) {
                    filter(s, row, f + g, _mm256_cvtepi32_ps(acc[g][v]), scale, error_w, error_r, threshold);
                }
            }
        }
    }
}

}  // namespace

const TopkKernels topk_avx2 = {screen, kPanel, 1, screen_exact, rescore, screen_row};

}  // namespace microtome::cpu
