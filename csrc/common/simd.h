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

#include "common/dtype.h"

namespace microtome {
namespace {

// bfloat16 is widened exactly and narrowed to nearest, ties to even; NaN becomes 0x7fc0. Integer arithmetic on every
// level, because the processor's own conversion flushes subnormals.
inline float widen(float a) { return a; }
inline float widen(bf16 a) {
    const uint32_t bits = static_cast<uint32_t>(a) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
inline void narrow(float a, float* out) { *out = a; }
inline void narrow(float a, bf16* out) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    *out = a != a ? bf16{0x7fc0} : static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

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
inline vf widen16(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
inline __m256i narrow16(vf a) {
    const __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
inline vf load(const bf16* p) { return widen16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(bf16* p, vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16(a)); }
inline vf load_n(const bf16* p, int64_t n) { return widen16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store_n(bf16* p, vf a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow16(a)); }

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
inline vf load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store(bf16* p, vf a) {
    const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i out = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
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
inline vf load(const bf16* p) { return vf{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
inline void store(bf16* p, vf a) {
    for (int j = 0; j < kWidth; ++j) narrow(a[j], p + j);
}

#endif

#if !defined(__AVX512F__)
inline vf load_n(const bf16* p, int64_t n) {
    bf16 whole[kWidth] = {};
    std::memcpy(whole, p, static_cast<size_t>(n) * sizeof(bf16));
    return load(whole);
}
inline void store_n(bf16* p, vf a, int64_t n) {
    bf16 whole[kWidth];
    store(whole, a);
    std::memcpy(p, whole, static_cast<size_t>(n) * sizeof(bf16));
}
#endif

constexpr int kParts = 16 / kWidth;  // vectors that hold the sixteen lanes

// Fold the sixteen lanes of a sum in one fixed order.
#if defined(__AVX2__)
inline float fold(const vf (&lanes)[kParts]) {
#if defined(__AVX512F__)
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes[0]), _mm512_extractf32x8_ps(lanes[0], 1));
#else
    const __m256 eight = _mm256_add_ps(lanes[0], lanes[1]);
#endif
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
inline float fold(const vf (&lanes)[kParts]) {
    float s[16];
    for (int p = 0; p < kParts; ++p) store(s + p * kWidth, lanes[p]);
    for (int half = 8; half; half /= 2) {
        for (int j = 0; j < half; ++j) s[j] += s[j + half];
    }
    return s[0];
}
#endif

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
