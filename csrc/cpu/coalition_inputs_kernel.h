// The kernel of coalition_inputs, compiled once per instruction set. See simd.h for the rules of such files.
//
// A column is in the coalition where lower[c] >= lo and upper[c] < hi. Both are the rank of its player, but for a
// column that is never absent, which has the largest and the least number: no branch, and any span, also an empty one.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/coalition_inputs.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kColumns = 2048;  // of a tile: its two bounds, 16 KiB, stay in the first-level cache

// Neighbouring rows of the table that share an order, and `count` columns of them.
template <class T>
struct Run {
    const int32_t *row, *lower, *upper;
    int64_t rows, count;
    const T *x, *background;
    int64_t x_stride, background_stride;
    T* out;
    int64_t out_stride;
};

#if defined(__AVX512F__)

inline void blend(uint8_t* out, const uint8_t* x, const uint8_t* b, __mmask16 all, __mmask16 in) {
    _mm_mask_storeu_epi8(out, all, _mm_mask_loadu_epi8(_mm_maskz_loadu_epi8(all, b), in, x));
}
inline void blend(uint16_t* out, const uint16_t* x, const uint16_t* b, __mmask16 all, __mmask16 in) {
    _mm256_mask_storeu_epi16(out, all, _mm256_mask_loadu_epi16(_mm256_maskz_loadu_epi16(all, b), in, x));
}
inline void blend(uint32_t* out, const uint32_t* x, const uint32_t* b, __mmask16 all, __mmask16 in) {
    _mm512_mask_storeu_epi32(out, all, _mm512_mask_loadu_epi32(_mm512_maskz_loadu_epi32(all, b), in, x));
}
inline void blend(uint64_t* out, const uint64_t* x, const uint64_t* b, __mmask16 all, __mmask16 in) {
    for (int half = 0; half < 2; ++half, out += 8, x += 8, b += 8, all >>= 8, in >>= 8) {
        const auto eight = static_cast<__mmask8>(all);
        const __m512i absent = _mm512_maskz_loadu_epi64(eight, b);
        _mm512_mask_storeu_epi64(out, eight, _mm512_mask_loadu_epi64(absent, static_cast<__mmask8>(in), x));
    }
}

// At most 16 * kParts columns, more than 16 * (kParts - 1): the bounds stay in registers.
template <class T, int kParts>
inline void few(const Run<T>& run) {
    const auto last = static_cast<__mmask16>((1u << (run.count - 16 * (kParts - 1))) - 1);
    __m512i lower[kParts], upper[kParts];
    for (int i = 0; i < kParts; ++i) {
        const __mmask16 all = i + 1 < kParts ? __mmask16{0xffff} : last;
        lower[i] = _mm512_maskz_loadu_epi32(all, run.lower + 16 * i);
        upper[i] = _mm512_maskz_loadu_epi32(all, run.upper + 16 * i);
    }
    const int64_t x_stride = run.x_stride, background_stride = run.background_stride, out_stride = run.out_stride;
    const int32_t* row = run.row;
    T* out = run.out;
    for (int64_t left = run.rows; left > 0; --left, row += 5, out += out_stride) {
        const T *x = run.x + row[0] * x_stride, *b = run.background + row[1] * background_stride;
        const __m512i lo = _mm512_set1_epi32(row[3]), hi = _mm512_set1_epi32(row[4]);
        for (int i = 0; i < kParts; ++i) {
            const __mmask16 all = i + 1 < kParts ? __mmask16{0xffff} : last;
            const __mmask16 above = _mm512_mask_cmpge_epi32_mask(all, lower[i], lo);
            blend(out + 16 * i, x + 16 * i, b + 16 * i, all, _mm512_mask_cmplt_epi32_mask(above, upper[i], hi));
        }
    }
}

// Of sixteen columns, those in the coalition. Where the two bounds are one rank a load is saved: it is at least lo and
// below hi where, less lo and without its sign, it is below hi - lo.
template <bool kOne>
inline __mmask16 inside(__mmask16 all, const int32_t* lower, const int32_t* upper, __m512i lo, __m512i hi) {
    const __m512i low = _mm512_maskz_loadu_epi32(all, lower);
    if (kOne) return _mm512_mask_cmplt_epu32_mask(all, _mm512_sub_epi32(low, lo), _mm512_sub_epi32(hi, lo));
    const __mmask16 above = _mm512_mask_cmpge_epi32_mask(all, low, lo);
    return _mm512_mask_cmplt_epi32_mask(above, _mm512_maskz_loadu_epi32(all, upper), hi);
}

template <class T, bool kOne>
inline void many(const Run<T>& run) {
    const int64_t whole = run.count / 16 * 16;
    const auto last = static_cast<__mmask16>((1u << (run.count - whole)) - 1);
    const int64_t x_stride = run.x_stride, background_stride = run.background_stride, out_stride = run.out_stride;
    const int32_t *row = run.row, *lower = run.lower, *upper = run.upper;
    T* out = run.out;
    for (int64_t left = run.rows; left > 0; --left, row += 5, out += out_stride) {
        const T *x = run.x + row[0] * x_stride, *b = run.background + row[1] * background_stride;
        const __m512i lo = _mm512_set1_epi32(row[3]), hi = _mm512_set1_epi32(row[4]);
        int64_t c = 0;
        for (; c < whole; c += 16) {
            blend(out + c, x + c, b + c, 0xffff, inside<kOne>(0xffff, lower + c, upper + c, lo, hi));
        }
        if (last) blend(out + c, x + c, b + c, last, inside<kOne>(last, lower + c, upper + c, lo, hi));
    }
}

template <class T>
inline void fill(const Run<T>& run) {
    switch ((run.count + 15) / 16) {
        case 1:
            return few<T, 1>(run);
        case 2:
            return few<T, 2>(run);
        case 3:
            return few<T, 3>(run);
        case 4:
            return few<T, 4>(run);
        default:
            return run.lower == run.upper ? many<T, true>(run) : many<T, false>(run);
    }
}

#else

#if defined(__AVX2__)

inline __m256i eight(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void blend32(void* out, const void* x, const void* b, __m256i in) {
    _mm256_storeu_si256(static_cast<__m256i*>(out), _mm256_blendv_epi8(eight(b), eight(x), in));
}
// Sixteen items, chosen by two vectors of eight masks.
inline void blend(uint8_t* out, const uint8_t* x, const uint8_t* b, __m256i first, __m256i second) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
    const __m128i in = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i absent = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    const __m128i present = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_blendv_epi8(absent, present, in));
}
inline void blend(uint16_t* out, const uint16_t* x, const uint16_t* b, __m256i first, __m256i second) {
    blend32(out, x, b, _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8));
}
inline void blend(uint32_t* out, const uint32_t* x, const uint32_t* b, __m256i first, __m256i second) {
    blend32(out, x, b, first);
    blend32(out + 8, x + 8, b + 8, second);
}
inline void blend(uint64_t* out, const uint64_t* x, const uint64_t* b, __m256i first, __m256i second) {
    for (const __m256i in : {first, second}) {
        blend32(out, x, b, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(in)));
        blend32(out + 4, x + 4, b + 4, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(in, 1)));
        out += 8, x += 8, b += 8;
    }
}

// At least sixteen columns; the last sixteen may overlap those before, which are then written twice, the same.
template <class T>
inline void choose(const int32_t* lower, const int32_t* upper, int32_t lo, int32_t hi, const T* x, const T* b, T* out,
                   int64_t count) {
    const __m256i under = _mm256_set1_epi32(lo - 1), over = _mm256_set1_epi32(hi);
    for (int64_t c = 0; c < count; c += 16) {
        const int64_t at = c + 16 <= count ? c : count - 16;
        __m256i in[2];
        for (int i = 0; i < 2; ++i) {
            in[i] = _mm256_and_si256(_mm256_cmpgt_epi32(eight(lower + at + 8 * i), under),
                                     _mm256_cmpgt_epi32(over, eight(upper + at + 8 * i)));
        }
        blend(out + at, x + at, b + at, in[0], in[1]);
    }
}

#endif

// Both are loaded and their bits chosen, which the compiler makes vectors of; a branch would be guessed wrong.
template <class T>
inline void choose_each(const int32_t* lower, const int32_t* upper, int32_t lo, int32_t hi, const T* x, const T* b,
                        T* __restrict out, int64_t count) {
    for (int64_t c = 0; c < count; ++c) {
        const T in = static_cast<T>(-static_cast<int32_t>((lower[c] >= lo) & (upper[c] < hi)));
        out[c] = static_cast<T>(b[c] ^ ((x[c] ^ b[c]) & in));
    }
}

template <class T>
inline void fill(const Run<T>& run) {
#if defined(__AVX2__)
    const auto go = run.count < 16 ? choose_each<T> : choose<T>;
#else
    const auto go = choose_each<T>;
#endif
    for (int64_t r = 0; r < run.rows; ++r) {
        const int32_t* row = run.row + r * 5;
        go(run.lower, run.upper, row[3], row[4], run.x + row[0] * run.x_stride,
           run.background + row[1] * run.background_stride, run.out + r * run.out_stride, run.count);
    }
}

#endif

// The code of what is wrong with a row, 0 for nothing. A negative number is a large one without its sign.
inline int64_t problem_of(const CoalitionInputs& a, const int32_t* row) {
    const auto u = [&](int i) { return static_cast<int64_t>(static_cast<uint32_t>(row[i])); };
    if ((u(0) < a.e) & (u(1) < a.n) & (u(2) < a.q) & (u(3) <= u(4)) & (u(4) <= a.p)) return 0;
    return u(0) >= a.e ? 1 : u(1) >= a.n ? 2 : u(2) >= a.q ? 3 : 4;
}

// The bounds of `count` columns; whether one of them is never absent, so that the two differ.
inline bool bounds_of(const int32_t* ranks, const int32_t* player, int64_t count, int32_t* lower, int32_t* upper) {
    int32_t least = 0;
    for (int64_t c = 0; c < count; ++c) {
        const int32_t j = player[c], rank = ranks[j < 0 ? 0 : j];
        lower[c] = j < 0 ? std::numeric_limits<int32_t>::max() : rank;
        upper[c] = j < 0 ? std::numeric_limits<int32_t>::min() : rank;
        least = j < least ? j : least;
    }
    return least < 0;
}

template <class T>
CoalitionProblem fill_rows(const CoalitionInputs& a, int64_t begin, int64_t end) {
    const auto *x = static_cast<const T*>(a.x), *background = static_cast<const T*>(a.background);
    auto* out = static_cast<T*>(a.out);
    int32_t tile_lower[kColumns], tile_upper[kColumns];
    for (int64_t from = begin, to; from < end; from = to) {
        const int32_t* row = a.rows + from * 5;
        for (to = from; to < end && a.rows[to * 5 + 2] == row[2]; ++to) {
            if (const int64_t code = problem_of(a, a.rows + to * 5)) return {code, to};
        }
        const int32_t none = 0, *ranks = a.p ? a.ranks + row[2] * a.p : &none;  // bounds_of reads one in any case
        for (int64_t c = 0; c < a.m; c += kColumns) {
            const int64_t count = a.m - c < kColumns ? a.m - c : kColumns;
            const int32_t *lower = ranks + c, *upper = lower;
            if (a.player != nullptr) {
                lower = upper = tile_lower;
                if (bounds_of(ranks, a.player + c, count, tile_lower, tile_upper)) upper = tile_upper;
            }
            fill(Run<T>{row, lower, upper, to - from, count, x + c, background + c, a.x_stride, a.background_stride,
                        out + from * a.m + c, a.m});
        }
    }
    return {0, 0};
}

constexpr CoalitionKernels kKernels = {
    {fill_rows<uint8_t>, fill_rows<uint16_t>, fill_rows<uint32_t>, fill_rows<uint64_t>}};

}  // namespace
}  // namespace microtome::cpu
