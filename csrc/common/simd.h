// One vector type per translation unit, as wide as the flags it is compiled with allow. Everything here is in an
// anonymous namespace and uses no standard container: an inline function shared between files could otherwise be
// emitted with AVX-512 in it and be kept by the linker for every processor.
//
// Sums are defined on 16 lanes whatever the width: element i belongs to lane i % 16, every lane adds in order with
// fma, and the lanes are folded 16 -> 8 -> 4 -> 2 -> 1. So AVX2, AVX-512 and AMX builds give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace microtome {
namespace {

#if defined(__AVX512F__)

using vf = __m512;
constexpr int kWidth = 16;
inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float a) { return _mm512_set1_ps(a); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline vf load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_n(float* p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf sqrt(vf a) { return _mm512_sqrt_ps(a); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline unsigned not_less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

#elif defined(__AVX2__)

using vf = __m256;
constexpr int kWidth = 8;
inline vf zero() { return _mm256_setzero_ps(); }
inline vf set1(float a) { return _mm256_set1_ps(a); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline __m256i first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}
inline vf load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_n(float* p, vf a, int64_t n) { _mm256_maskstore_ps(p, first(n), a); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf sqrt(vf a) { return _mm256_sqrt_ps(a); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline unsigned not_less(vf a, vf b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
}

#else

typedef float vf __attribute__((vector_size(16)));
constexpr int kWidth = 4;
inline vf zero() { return vf{0, 0, 0, 0}; }
inline vf set1(float a) { return vf{a, a, a, a}; }
inline vf load(const float* p) {
    vf a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store(float* p, vf a) { std::memcpy(p, &a, sizeof a); }
inline vf load_n(const float* p, int64_t n) {
    vf a = zero();
    std::memcpy(&a, p, static_cast<size_t>(n) * sizeof(float));
    return a;
}
inline void store_n(float* p, vf a, int64_t n) { std::memcpy(p, &a, static_cast<size_t>(n) * sizeof(float)); }
inline vf add(vf a, vf b) { return a + b; }
inline vf sub(vf a, vf b) { return a - b; }
inline vf mul(vf a, vf b) { return a * b; }
inline vf div(vf a, vf b) { return a / b; }
inline vf sqrt(vf a) {
    return vf{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
inline vf fma(vf a, vf b, vf c) { return a * b + c; }  // two roundings: the generic level's bits differ
inline vf max(vf a, vf b) { return a > b ? a : b; }

#endif

constexpr int kParts = 16 / kWidth;  // vectors that hold the sixteen lanes

// Fold the sixteen lanes in one fixed order: lane j takes lane j + 8, then j + 4, j + 2, j + 1.
inline float fold(const vf (&lanes)[kParts]) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes[0]), _mm512_extractf32x8_ps(lanes[0], 1));
#else
    const __m256 eight = _mm256_add_ps(lanes[0], lanes[1]);
#endif
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    const vf eight[2] = {lanes[0] + lanes[2], lanes[1] + lanes[3]};
    const vf four = eight[0] + eight[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
#endif
}

// <a, b> over d elements, in the order defined above.
inline float dot(const float* a, const float* b, int64_t d) {
    vf lanes[kParts];
    for (int p = 0; p < kParts; ++p) lanes[p] = zero();
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) {
        for (int p = 0; p < kParts; ++p) {
            lanes[p] = fma(load(a + i + p * kWidth), load(b + i + p * kWidth), lanes[p]);
        }
    }
    for (int p = 0; p < kParts && i + p * kWidth < d; ++p) {
        const int64_t left = d - i - p * kWidth, n = left < kWidth ? left : kWidth;
        lanes[p] = fma(load_n(a + i + p * kWidth, n), load_n(b + i + p * kWidth, n), lanes[p]);
    }
    return fold(lanes);
}

}  // namespace
}  // namespace microtome
