// One encoder row to its 16-bit shadow and the numbers that bound the shadow's error. Included by every file that
// refreshes a shadow, once per instruction set.
//
// Why the bounds hold. Let u = 2^-24.
// - Sums of squares run in float over entries scaled by a power of two that brings the largest into [1, 2) (for the
//   q15 residual: divided by the step, so within about 1/2). Nothing overflows. A square that underflows loses less
//   than 2^-126, in all less than d 2^-126, so a norm loses less than sqrt(d) 2^-63: sqrt(d) 2^-62 is added.
// - A lane adds d/16 terms, then sixteen lanes are folded: the sum is at least (1 - u)^(d/16 + 6) times the true one,
//   and its root is short by less than (d/16 + 6) u. Entries of the q15 residual carry three more roundings each (one
//   fma, the product with 1/step, 1/step itself). A factor 1 + (d/16 + 16) 2 u covers both while d < 2^24.
// - Whatever is flushed to zero as a denormal (by the AMX tile unit, which flushes bf16 denormals, or by a processor
//   mode) is below 2^-126 an entry, in norm below 2^-126 sqrt(d) <= 2^-110: 2^-110 is always added.
// - q15: step = max(max|w| / 32767, |w| / (46340 - sqrt(d))) (1 + 2^-20). A code differs from w / step by at most 1/2
//   and by the two roundings of w * (1 / step), which 2^-20 outweighs; so |q| <= 32767, and
//   |q|_2 <= 46340 - sqrt(d) + sqrt(d) / 2 < 46340.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace microtome {
namespace {

constexpr int kScreenBf16 = 0, kScreenQ15 = 1;

#if defined(__AVX512F__)

inline vf magnitude_max(vf a, vf b) {  // of |a| and b as integers: NaN and infinity count as largest
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_castps_si512(b)));
}
inline vf round_bf16(vf a) {
    const __m512i bits = _mm512_castps_si512(a), magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_and_si512(bits, magnitude), _mm512_add_epi32(_mm512_set1_epi32(0x7fff), even));
    r = _mm512_and_si512(_mm512_min_epi32(r, _mm512_set1_epi32(0x7f7f0000)), _mm512_set1_epi32(0x7fff0000));
    return _mm512_castsi512_ps(_mm512_or_si512(r, _mm512_andnot_si512(magnitude, bits)));
}
inline void store_low16(int16_t* out, const vf (&a)[kParts]) {
    const __m256i packed = _mm512_cvtepi32_epi16(_mm512_castps_si512(a[0]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
}
inline void store_high16(int16_t* out, const vf (&a)[kParts]) {
    const __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a[0]), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
}

#elif defined(__AVX2__)

inline vf magnitude_max(vf a, vf b) {  // of |a| and b as integers: NaN and infinity count as largest
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_castps_si256(b)));
}
inline vf round_bf16(vf a) {
    const __m256i bits = _mm256_castps_si256(a), magnitude = _mm256_set1_epi32(0x7fffffff);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_and_si256(bits, magnitude), _mm256_add_epi32(_mm256_set1_epi32(0x7fff), even));
    r = _mm256_and_si256(_mm256_min_epi32(r, _mm256_set1_epi32(0x7f7f0000)), _mm256_set1_epi32(0x7fff0000));
    return _mm256_castsi256_ps(_mm256_or_si256(r, _mm256_andnot_si256(magnitude, bits)));
}
inline void store_packed(int16_t* out, __m256i a, __m256i b) {  // lanes hold 0 .. 65535
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
}
inline void store_low16(int16_t* out, const vf (&a)[kParts]) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    store_packed(out, _mm256_and_si256(_mm256_castps_si256(a[0]), low),
                 _mm256_and_si256(_mm256_castps_si256(a[1]), low));
}
inline void store_high16(int16_t* out, const vf (&a)[kParts]) {
    store_packed(out, _mm256_srli_epi32(_mm256_castps_si256(a[0]), 16),
                 _mm256_srli_epi32(_mm256_castps_si256(a[1]), 16));
}

#else

typedef int32_t vi __attribute__((vector_size(16)));
inline vi bits_of(vf a) {
    vi bits;
    std::memcpy(&bits, &a, sizeof bits);
    return bits;
}
inline vf floats_of(vi bits) {
    vf a;
    std::memcpy(&a, &bits, sizeof a);
    return a;
}
inline vf magnitude_max(vf a, vf b) {  // of |a| and b as integers: NaN and infinity count as largest
    const vi x = bits_of(a) & 0x7fffffff, y = bits_of(b);
    return floats_of(x > y ? x : y);
}
inline vf round_bf16(vf a) {
    const vi bits = bits_of(a);
    vi r = (bits & 0x7fffffff) + 0x7fff + ((bits >> 16) & 1);
    const vi largest = {0x7f7f0000, 0x7f7f0000, 0x7f7f0000, 0x7f7f0000};
    r = (r > largest ? largest : r) & 0x7fff0000;
    return floats_of(r | (bits & static_cast<int32_t>(0x80000000u)));
}
inline void store_low16(int16_t* out, const vf (&a)[kParts]) {
    for (int p = 0; p < kParts; ++p) {
        const vi bits = bits_of(a[p]);
        for (int j = 0; j < kWidth; ++j) out[p * kWidth + j] = static_cast<int16_t>(bits[j] & 0xffff);
    }
}
inline void store_high16(int16_t* out, const vf (&a)[kParts]) {
    for (int p = 0; p < kParts; ++p) {
        const vi bits = bits_of(a[p]);
        for (int j = 0; j < kWidth; ++j) out[p * kWidth + j] = static_cast<int16_t>(bits[j] >> 16);
    }
}

#endif

// w - q * step with one rounding. Without fma a double holds the product exactly, and the difference to 2^-53 |w|; the
// bound allows 2^-40 |w|.
inline vf residual(vf q, vf step, vf w) {
#if defined(__AVX2__)
    return fma(sub(zero(), q), step, w);
#else
    vf r;
    for (int j = 0; j < kWidth; ++j) {
        r[j] = static_cast<float>(static_cast<double>(w[j]) - static_cast<double>(q[j]) * static_cast<double>(step[j]));
    }
    return r;
#endif
}

// body(i, a) for every sixteen entries a of a row, zeros behind the last.
template <class Body>
inline void for_sixteens(const float* w, int64_t d, Body body) {
    vf a[kParts];
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) {
        for (int p = 0; p < kParts; ++p) a[p] = load(w + i + p * kWidth);
        body(i, a);
    }
    if (i == d) return;
    for (int p = 0; p < kParts; ++p) {
        const int64_t n = d - i - p * kWidth;
        a[p] = n >= kWidth ? load(w + i + p * kWidth) : n > 0 ? load_n(w + i + p * kWidth, n) : zero();
    }
    body(i, a);
}

inline int32_t largest_bits(const float* w, int64_t d) {
    vf lanes[kParts];
    for (int p = 0; p < kParts; ++p) lanes[p] = zero();
    for_sixteens(w, d, [&](int64_t, const vf(&a)[kParts]) {
        for (int p = 0; p < kParts; ++p) lanes[p] = magnitude_max(a[p], lanes[p]);
    });
    int32_t bits[16], best = 0;
    for (int p = 0; p < kParts; ++p) std::memcpy(bits + p * kWidth, &lanes[p], sizeof(vf));
    for (int j = 0; j < 16; ++j) best = bits[j] > best ? bits[j] : best;
    return best;
}

// A float at or above a positive double.
inline float round_up(double a) { return static_cast<float>(a * (1 + 0x1p-22)); }

// Writes `stride` int16 codes (zero from column d on) and stats = {scale, norm, residual norm, 0}, norms from above.
// kind: kScreenBf16 (nearest even, largest finite where that would be infinite) or kScreenQ15. stride is a multiple
// of 16 and at least d; d < 2^24. False when the row holds NaN or infinity: then its codes are zero and its norms
// infinite. A row whose norm is above FLT_MAX is screened with norm infinity.
inline bool screen_row(const float* w, int64_t d, int64_t stride, int kind, int16_t* shadow, float* stats) {
    const int32_t bits = largest_bits(w, d);
    const bool finite = bits < 0x7f800000;
    if (bits == 0 || !finite) {
        std::memset(shadow, 0, static_cast<size_t>(stride) * sizeof(int16_t));
        const float norm = finite ? 0.0f : __builtin_inff();
        stats[0] = 1.0f, stats[1] = norm, stats[2] = norm, stats[3] = 0.0f;
        return finite;
    }
    int exponent = (bits >> 23) - 127;
    exponent = exponent < -100 ? -100 : exponent > 126 ? 126 : exponent;
    const double power = std::ldexp(1.0, exponent), rows = static_cast<double>(d);
    const double factor = 1 + (rows / 16 + 16) * 0x1p-23, lost = std::sqrt(rows) * 0x1p-62;
    const auto bound = [&](float squares, double unit) {
        return (std::sqrt(static_cast<double>(squares)) * factor + lost) * unit + 0x1p-110;
    };
    const vf shrink = set1(static_cast<float>(1 / power));
    const int64_t written = (d + 15) / 16 * 16;
    std::memset(shadow + written, 0, static_cast<size_t>(stride - written) * sizeof(int16_t));
    vf lanes[kParts], sums[kParts];
    for (int p = 0; p < kParts; ++p) lanes[p] = sums[p] = zero();

    if (kind == kScreenBf16) {
        for_sixteens(w, d, [&](int64_t i, vf(&a)[kParts]) {
            for (int p = 0; p < kParts; ++p) {
                const vf high = round_bf16(a[p]), low = mul(sub(a[p], high), shrink), whole = mul(a[p], shrink);
                lanes[p] = fma(whole, whole, lanes[p]);
                sums[p] = fma(low, low, sums[p]);
                a[p] = high;
            }
            store_high16(shadow + i, a);
        });
        stats[0] = 1.0f;
        stats[1] = round_up(bound(fold(lanes), power));
        stats[2] = round_up(bound(fold(sums), power));
        stats[3] = 0.0f;
        return true;
    }

    for_sixteens(w, d, [&](int64_t, const vf(&a)[kParts]) {
        for (int p = 0; p < kParts; ++p) {
            const vf whole = mul(a[p], shrink);
            lanes[p] = fma(whole, whole, lanes[p]);
        }
    });
    const double norm = bound(fold(lanes), power);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    double wide = static_cast<double>(largest) / 32767.0;
    const double spread = norm / (46340.0 - std::sqrt(rows));
    wide = (spread > wide ? spread : wide) * (1 + 0x1p-20);
    const float scale = static_cast<float>(wide < 0x1p-100 ? 0x1p-100 : wide);
    const vf step = set1(scale), inverse = set1(static_cast<float>(1.0 / scale));
    const vf magic = set1(0x1.8p23f);  // adding it rounds to an integer and leaves that integer in the low bits
    for_sixteens(w, d, [&](int64_t i, vf(&a)[kParts]) {
        for (int p = 0; p < kParts; ++p) {
            const vf shifted = add(mul(a[p], inverse), magic);
            const vf left = mul(residual(sub(shifted, magic), step, a[p]), inverse);
            sums[p] = fma(left, left, sums[p]);
            a[p] = shifted;
        }
        store_low16(shadow + i, a);
    });
    stats[0] = scale;
    stats[1] = round_up(norm);
    stats[2] = round_up(bound(fold(sums), scale) + 0x1p-40 * norm);
    stats[3] = 0.0f;
    return true;
}

}  // namespace
}  // namespace microtome
