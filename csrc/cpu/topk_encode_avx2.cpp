// Screening in 16-bit integers: vpmaddwd multiplies twice as many pairs a cycle as an fp32 fma, and the sums are exact.
#include "cpu/screen_row.h"
#include "cpu/topk_encode_exact.h"
#include "cpu/topk_encode_screen.h"

namespace microtome::cpu {
namespace {

constexpr int kFeatures = 6;  // 6 x 2 accumulators, 2 vectors of x, 1 broadcast, 1 product: sixteen registers

// Integer dot products of six features with the sixteen rows of a panel. The sums live in a local array that only
// constants index, or the compiler would keep them in memory.
inline void tile(const int16_t* w, int64_t stride, const int16_t* x, int64_t padded, float (&out)[kFeatures][kPanel]) {
    __m256i acc[kFeatures][2];
#pragma GCC unroll 6
    for (int g = 0; g < kFeatures; ++g) acc[g][0] = acc[g][1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < padded; i += 2) {
        const __m256i x0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + i * kPanel));
        const __m256i x1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + i * kPanel + kPanel));
#pragma GCC unroll 6
        for (int g = 0; g < kFeatures; ++g) {
            int32_t pair;
            std::memcpy(&pair, w + g * stride + i, sizeof pair);
            const __m256i b = _mm256_set1_epi32(pair);
            acc[g][0] = _mm256_add_epi32(acc[g][0], _mm256_madd_epi16(b, x0));
            acc[g][1] = _mm256_add_epi32(acc[g][1], _mm256_madd_epi16(b, x1));
            // Keeps the compiler from starting all six features at once, which would spill the accumulators.
            asm volatile("" : "+x"(acc[g][0]), "+x"(acc[g][1]));
        }
    }
#pragma GCC unroll 6
    for (int g = 0; g < kFeatures; ++g) {
        store(out[g], _mm256_cvtepi32_ps(acc[g][0]));
        store(out[g] + 8, _mm256_cvtepi32_ps(acc[g][1]));
    }
}

void screen(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1) {
    screen_tiles<kFeatures, kPanel>(s, f0, f1, r0, r1, tile);
}

}  // namespace

const TopkKernels topk_avx2 = {screen, kPanel, 1, screen_exact, rescore, screen_row};

}  // namespace microtome::cpu
