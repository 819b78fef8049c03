// Screening in 16-bit integers: vpmaddwd multiplies twice as many pairs a cycle as an fp32 fma, and the sums are exact.
#include "cpu/screen_row.h"
#include "cpu/topk_encode_exact.h"
#include "cpu/topk_encode_screen.h"

namespace microtome::cpu {
namespace {

constexpr int kFeatures = 6;  // 6 x 2 accumulators, 2 vectors of x, 1 broadcast, 1 product: sixteen registers

// sum += pairwise products. Written as one piece and in order: left to itself, gcc 12 starts all six features at once
// and spills the accumulators.
inline void multiply_add(__m256i& sum, __m256i b, __m256i x) {
    __m256i product;
    asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(b), "x"(x));
}

// Integer dot products of six features with the sixteen rows of a panel. The sums live in a local array that only
// constants index, or the compiler would keep them in memory.
inline void tile(const int16_t* w, int64_t stride, const int16_t* x, int64_t padded, float (&out)[kFeatures][kPanel]) {
    __m256i acc[kFeatures][2];
#pragma GCC unroll 6
    for (int g = 0; g < kFeatures; ++g) acc[g][0] = acc[g][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int64_t i = 0; i < padded; i += 2) {
        const __m256i x0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + i * kPanel));
        const __m256i x1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + i * kPanel + kPanel));
#pragma GCC unroll 6
        for (int g = 0; g < kFeatures; ++g) {
            int32_t pair;
            std::memcpy(&pair, w + g * stride + i, sizeof pair);
            const __m256i b = _mm256_set1_epi32(pair);
            multiply_add(acc[g][0], b, x0);
            multiply_add(acc[g][1], b, x1);
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

const TopkKernels topk_avx2 = {screen, kPanel, 1, screen_exact, rescore, best_first, screen_row};

}  // namespace microtome::cpu
