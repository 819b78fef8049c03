// A tile that may leave out what is zero: products of the listed entries of a few rows with a panel. After a ReLU many
// entries are zero in every row of a sliver, where the rows are neighbours; the sums are those of panel_fma.h, bit for
// bit, since a product with zero changes no sum. What becomes of the sums is the caller's: they need not be stored.
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

// What becomes of the sums of a tile: these are stored, [rows][32].
struct StoreSums {
    float* sums;
    StoreSums at(int64_t column) const { return {sums + column}; }
    void operator()(int r, vf left, vf right) const {
        store(sums + r * kPanelLanes, left);
        store(sums + r * kPanelLanes + kWidth, right);
    }
};

// The sums of the listed entries, at most kBlock of them, and of `before` [R][32] unless it is null.
template <int R, class Panel, class Tail>
__attribute__((noinline)) void multiply_listed_block(const char* lines, const char* panel, const int32_t* list,
                                                     int64_t count, const float* before, const Tail& tail) {
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
            // As in panel_fma.h: one row after another, or sums would be spilled.
#if defined(__AVX512F__)
            asm volatile("" : "+v"(s[r][0]), "+v"(s[r][1]));
#elif defined(__AVX2__)
            asm volatile("" : "+x"(s[r][0]), "+x"(s[r][1]));
#endif
        }
    }
    if (before) {
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
            s[r][0] = add(load(before + r * kPanelLanes), s[r][0]);
            s[r][1] = add(load(before + r * kPanelLanes + kWidth), s[r][1]);
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r) tail(r, s[r][0], s[r][1]);
}

// sums [R][32]: where sums of more than one block wait.
template <int R, class Panel, class Tail>
inline void multiply_listed_rows(const char* lines, const char* panel, const int32_t* list, int64_t count, float* sums,
                                 const Tail& tail) {
    constexpr auto kEnd = static_cast<int32_t>(kBlock);
    int64_t from = 0, to;
    do {
        const int32_t limit = count ? (list[from] / kEnd + 1) * kEnd : 0;
        to = count;
        if (count && list[count - 1] >= limit) {
            for (to = from + 1; list[to] < limit; ++to) {
            }
        }
        for (int64_t column = 0; column < kPanelLanes; column += kTileWidth) {
            const char* weights = panel + column * 4;
            const float* before = from ? sums + column : nullptr;
            if (to < count) {
                multiply_listed_block<R, Panel>(lines, weights, list + from, to - from, before,
                                                StoreSums{sums + column});
            } else {
                multiply_listed_block<R, Panel>(lines, weights, list + from, to - from, before, tail.at(column));
            }
        }
        from = to;
    } while (from < count);
}

// The products of `rows` rows with the panel's columns, in the listed entries, go to `tail` row by row.
template <class Panel, class Tail, int R = kTileRows>
inline void multiply_listed(int64_t rows, const char* lines, const char* panel, const int32_t* list, int64_t count,
                            float* sums, const Tail& tail) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_listed_rows<R, Panel>(lines, panel, list, count, sums, tail);
        multiply_listed<Panel, Tail, R - 1>(rows, lines, panel, list, count, sums, tail);
    }
}

}  // namespace
}  // namespace microtome
