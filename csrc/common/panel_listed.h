// A tile that leaves out what is zero: products of the listed entries of a few rows with a panel. After a ReLU many
// entries are zero in every row of a sliver, where the rows are neighbours; the sums are those of panel_fma.h, bit for
// bit, since a product with zero changes no sum.
#pragma once

#include "common/panel_fma.h"

namespace microtome {
namespace {

// nonzero: a bit for each of the sixteen lanes of bits, those of an entry of four bytes.
#if defined(__AVX512F__)
inline unsigned nonzero(const vf (&bits)[kParts]) {
    const __m512i b = _mm512_castps_si512(bits[0]);
    return _mm512_test_epi32_mask(b, b);
}
inline vf either(vf a, vf b) {
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
#elif defined(__AVX2__)
inline unsigned nonzero(const vf (&bits)[kParts]) {
    unsigned mask = 0;
    for (int part = 0; part < kParts; ++part) {
        const __m256i none = _mm256_cmpeq_epi32(_mm256_castps_si256(bits[part]), _mm256_setzero_si256());
        mask |= (~static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(none))) & 0xffu) << part * 8;
    }
    return mask;
}
inline vf either(vf a, vf b) { return _mm256_or_ps(a, b); }
#else
typedef unsigned lanes_of_vf __attribute__((vector_size(sizeof(vf))));
inline unsigned nonzero(const vf (&bits)[kParts]) {
    uint32_t lanes[16];
    std::memcpy(lanes, bits, sizeof lanes);
    unsigned mask = 0;
    for (int j = 0; j < 16; ++j) mask |= (lanes[j] != 0 ? 1u : 0u) << j;
    return mask;
}
inline vf either(vf a, vf b) {
    return reinterpret_cast<vf>(reinterpret_cast<lanes_of_vf>(a) | reinterpret_cast<lanes_of_vf>(b));
}
#endif

// list = the positions of the bits of seen [lines], sixteen bits each; may write sixteen entries beyond. Returns how
// many.
inline int64_t list_bits(const uint16_t* seen, int64_t lines, int32_t* list) {
    int64_t count = 0;
    for (int64_t line = 0; line < lines; ++line) {
        unsigned bits = seen[line];
#if defined(__AVX512F__)
        const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(line * 16)),
                                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        _mm512_storeu_si512(list + count, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), at));
        count += __builtin_popcount(bits);
#else
        for (; bits; bits &= bits - 1) list[count++] = static_cast<int32_t>(line * 16 + __builtin_ctz(bits));
#endif
    }
    return count;
}

template <int R, class Panel>
__attribute__((noinline)) void multiply_listed_block(const char* lines, const char* panel, const int32_t* list,
                                                     int64_t count, bool fresh, float* sums) {
    static_assert(Panel::kEntries == 1, "an entry is a step");
    vf s[R][2];
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) s[r][0] = s[r][1] = zero();
    for (int64_t k = 0; k < count; ++k) {
        const uint64_t entry = static_cast<uint32_t>(list[k]);
        const float* x = reinterpret_cast<const float*>(lines + entry / 16 * (R * kLine) + entry % 16 * 4);
        const char* w = panel + entry * kStep;
        const vf left = Panel::read(w, 0), right = Panel::read(w + kWidth * 4, 0);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            const vf a = set1(x[r * 16]);
            s[r][0] = Panel::multiply_add(a, left, s[r][0]);
            s[r][1] = Panel::multiply_add(a, right, s[r][1]);
#if defined(__AVX512F__)
            asm volatile("" : "+v"(s[r][0]), "+v"(s[r][1]));
#elif defined(__AVX2__)
            asm volatile("" : "+x"(s[r][0]), "+x"(s[r][1]));
#endif
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
inline void multiply_listed_rows(const char* lines, const char* panel, const int32_t* list, int64_t count,
                                 float* sums) {
    if (count == 0) std::memset(sums, 0, R * kPanelLanes * sizeof(float));
    for (int64_t from = 0, to; from < count; from = to) {
        const int32_t limit =
            list[from] / static_cast<int32_t>(kBlock) * static_cast<int32_t>(kBlock) + static_cast<int32_t>(kBlock);
        to = count;
        if (list[count - 1] >= limit) {
            for (to = from + 1; list[to] < limit; ++to) {
            }
        }
        for (int half = 0; half < kPanelLanes / kTileWidth; ++half) {
            multiply_listed_block<R, Panel>(lines, panel + half * kTileWidth * 4, list + from, to - from, from == 0,
                                            sums + half * kTileWidth);
        }
    }
}

template <class Panel, int R = kTileRows>
inline void multiply_listed(int64_t rows, const char* lines, const char* panel, const int32_t* list, int64_t count,
                            float* sums) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_listed_rows<R, Panel>(lines, panel, list, count, sums);
        multiply_listed<Panel, R - 1>(rows, lines, panel, list, count, sums);
    }
}

}  // namespace
}  // namespace microtome
