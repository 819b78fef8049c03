// Sixteen rows side by side: panel [d, 16], so that one vector holds the same element of many rows. And what a kernel
// does to the lanes of a vector on their own. Anonymous namespace and no containers, as simd.h says.
#pragma once

#include "common/simd.h"

namespace microtome {
namespace {

constexpr int64_t kPanel = 16;

// within: lanes lo .. hi - 1 of a, `other` elsewhere; lo and hi may lie outside the vector. largest: of the lanes.
#if defined(__AVX512F__)

inline vf within(vf a, int64_t lo, int64_t hi, float other) {
    const auto clamped = [](int64_t i) { return i < 0 ? 0 : i > kWidth ? kWidth : i; };
    const auto keep = static_cast<__mmask16>(((1u << clamped(hi)) - 1) & ~((1u << clamped(lo)) - 1));
    return _mm512_mask_blend_ps(keep, set1(other), a);
}
inline float largest(vf a) { return _mm512_reduce_max_ps(a); }

// out[c * 16 + j] = row[j][c] for c < count, count <= 16.
inline void transpose(const float* const* row, int64_t count, float* out) {
    __m512 a[16], b[16];
    for (int j = 0; j < 16; ++j) a[j] = load_n(row[j], count);
    for (int j = 0; j < 16; j += 2) {
        b[j] = _mm512_unpacklo_ps(a[j], a[j + 1]);
        b[j + 1] = _mm512_unpackhi_ps(a[j], a[j + 1]);
    }
    const auto pair = [](__m512 low, __m512 high, bool upper) {
        const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
        return _mm512_castpd_ps(upper ? _mm512_unpackhi_pd(l, h) : _mm512_unpacklo_pd(l, h));
    };
    for (int j = 0; j < 16; j += 4) {  // a[j + c]: columns c, c + 4, c + 8, c + 12 of rows j .. j + 3
        a[j] = pair(b[j], b[j + 2], false);
        a[j + 1] = pair(b[j], b[j + 2], true);
        a[j + 2] = pair(b[j + 1], b[j + 3], false);
        a[j + 3] = pair(b[j + 1], b[j + 3], true);
    }
    for (int c = 0; c < 4; ++c) {
        const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
        const __m512 even_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
        const __m512 odd_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
        const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
        b[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        b[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
        b[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        b[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
    if (count == 16) {
        for (int c = 0; c < 16; ++c) store(out + c * kPanel, b[c]);
    } else {
        for (int c = 0; c < count; ++c) store(out + c * kPanel, b[c]);
    }
}
constexpr int64_t kColumnsAtOnce = 16;

#elif defined(__AVX2__)

inline vf within(vf a, int64_t lo, int64_t hi, float other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(hi)), lane);
    const __m256i keep = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(lo)), lane), below);
    return _mm256_blendv_ps(set1(other), a, _mm256_castsi256_ps(keep));
}
inline float largest(vf a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// out[c * 16 + j] = row[j][c] for c < count, count <= 8.
inline void transpose(const float* const* row, int64_t count, float* out) {
    for (int half = 0; half < 16; half += 8) {
        __m256 a[8], b[8];
        for (int j = 0; j < 8; ++j) a[j] = count == 8 ? load(row[half + j]) : load_n(row[half + j], count);
        for (int j = 0; j < 8; j += 2) {
            b[j] = _mm256_unpacklo_ps(a[j], a[j + 1]);
            b[j + 1] = _mm256_unpackhi_ps(a[j], a[j + 1]);
        }
        for (int j = 0; j < 8; j += 4) {  // a[j + c]: columns c and c + 4 of rows j .. j + 3
            a[j] = _mm256_shuffle_ps(b[j], b[j + 2], 0x44);
            a[j + 1] = _mm256_shuffle_ps(b[j], b[j + 2], 0xee);
            a[j + 2] = _mm256_shuffle_ps(b[j + 1], b[j + 3], 0x44);
            a[j + 3] = _mm256_shuffle_ps(b[j + 1], b[j + 3], 0xee);
        }
        for (int c = 0; c < 4; ++c) {
            b[c] = _mm256_permute2f128_ps(a[c], a[4 + c], 0x20);
            b[4 + c] = _mm256_permute2f128_ps(a[c], a[4 + c], 0x31);
        }
        for (int c = 0; c < count; ++c) store(out + c * kPanel + half, b[c]);
    }
}
constexpr int64_t kColumnsAtOnce = 8;

#else

inline vf within(vf a, int64_t lo, int64_t hi, float other) {
    for (int j = 0; j < kWidth; ++j) a[j] = j >= lo && j < hi ? a[j] : other;
    return a;
}
inline float largest(vf a) {
    float best = a[0];
    for (int j = 1; j < kWidth; ++j) best = a[j] > best ? a[j] : best;
    return best;
}
inline void transpose(const float* const* row, int64_t count, float* out) {
    for (int64_t c = 0; c < count; ++c) {
        for (int j = 0; j < kPanel; ++j) out[c * kPanel + j] = row[j][c];
    }
}
constexpr int64_t kColumnsAtOnce = 16;

#endif

// panel [d, 16] of sixteen rows of d elements; a row may stand in several places.
inline void pack_panel(const float* const* row, int64_t d, float* panel) {
    const float* at[kPanel];
    for (int64_t c = 0; c < d; c += kColumnsAtOnce) {
        for (int j = 0; j < kPanel; ++j) at[j] = row[j] + c;
        transpose(at, d - c < kColumnsAtOnce ? d - c : kColumnsAtOnce, panel + c * kPanel);
    }
}

}  // namespace
}  // namespace microtome
