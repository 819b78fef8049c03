// The kernels of coalition_gram, compiled once per instruction set. See simd.h for the rules of such files. Numbers are
// added one by one in the order of the coalitions, each to an entry of its own: the bits are those of every level.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/coalition_gram.h"

namespace microtome::cpu {
namespace {

// Eight doubles. spread(w, byte) has w where the byte has a bit, else 0.
#if defined(__AVX512F__)

using v8 = __m512d;
inline v8 load(const double* p) { return _mm512_loadu_pd(p); }
inline void store(double* p, v8 a) { _mm512_storeu_pd(p, a); }
inline v8 add(v8 a, v8 b) { return _mm512_add_pd(a, b); }
inline v8 spread(double w, uint32_t byte) {
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(byte), _mm512_set1_pd(w));
}

#elif defined(__AVX2__)

struct v8 {
    __m256d low, high;
};
inline v8 load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
inline void store(double* p, v8 a) {
    _mm256_storeu_pd(p, a.low);
    _mm256_storeu_pd(p + 4, a.high);
}
inline v8 add(v8 a, v8 b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
inline __m256d spread4(__m256d w, uint32_t nibble) {
    const __m256i bit = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i has = _mm256_and_si256(_mm256_set1_epi64x(nibble), bit);
    return _mm256_and_pd(w, _mm256_castsi256_pd(_mm256_cmpeq_epi64(has, bit)));
}
inline v8 spread(double w, uint32_t byte) {
    const __m256d all = _mm256_set1_pd(w);
    return {spread4(all, byte & 15), spread4(all, byte >> 4 & 15)};
}

#else

typedef double v2 __attribute__((vector_size(16)));
struct v8 {
    v2 part[4];
};
inline v8 load(const double* p) {
    v8 a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
inline void store(double* p, v8 a) { std::memcpy(p, &a, sizeof a); }
inline v8 add(v8 a, v8 b) {
    for (int i = 0; i < 4; ++i) a.part[i] += b.part[i];
    return a;
}
typedef int64_t m2 __attribute__((vector_size(16)));
constexpr m2 kTwo[4] = {{0, 0}, {-1, 0}, {0, -1}, {-1, -1}};  // a branch would be guessed wrong
inline v8 spread(double w, uint32_t byte) {
    const v2 all = {w, w};
    v8 a;
    for (int i = 0; i < 4; ++i) a.part[i] = (v2)((m2)all & kTwo[byte >> 2 * i & 3]);
    return a;
}

#endif

// The bits of one group of players in each coalition.
struct Members {
    const uint64_t* words;
    int64_t stride;
    int shift;
    Members(const CoalitionGram& a, int64_t group, int64_t begin)
        : words(a.coalitions + begin * a.w + group / 2), stride(a.w), shift(group % 2 ? 32 : 0) {}
    uint32_t operator[](int64_t k) const { return static_cast<uint32_t>(words[k * stride] >> shift); }
};

// What a coalition brings to a row: its weight in the columns of its members, or numbers packed before.
struct Weighted {
    Members members;
    const double* weights;
    template <int kColumns>
    void read(int64_t k, v8 (&row)[kColumns]) const {
        const uint32_t bits = members[k];
        for (int i = 0; i < kColumns; ++i) row[i] = spread(weights[k], bits >> 8 * i & 255);
    }
};
struct Packed {
    const double* numbers;
    template <int kColumns>
    void read(int64_t k, v8 (&row)[kColumns]) const {
        for (int i = 0; i < kColumns; ++i) row[i] = load(numbers + (k * kColumns + i) * 8);
    }
};

// A table of 2 * kRows fours of players by 8 * kColumns columns. On the diagonal only columns up to a player's own byte
// are kept.
template <int kColumns, bool kDiagonal>
struct Layout {
    static constexpr int width(int four) { return kDiagonal ? four / 2 + 1 : kColumns; }  // in eights of columns
    static constexpr int start(int four) { return four == 0 ? 0 : start(four - 1) + 16 * 8 * width(four - 1); }
};

template <int kColumns, bool kDiagonal, int kFour, int kFours>
inline void add_row(uint32_t bits, const v8 (&row)[kColumns], double* table) {
    if constexpr (kFour < kFours) {
        using L = Layout<kColumns, kDiagonal>;
        double* entry = table + L::start(kFour) + (bits >> 4 * kFour & 15) * (8 * L::width(kFour));
        for (int i = 0; i < L::width(kFour); ++i) store(entry + 8 * i, add(load(entry + 8 * i), row[i]));
        add_row<kColumns, kDiagonal, kFour + 1, kFours>(bits, row, table);
    }
}

template <int kRows, int kColumns, bool kDiagonal, class Source>
inline void accumulate(const Members& rows, const Source& source, int64_t count, double* table) {
    for (int64_t k = 0; k < count; ++k) {
        v8 row[kColumns];
        source.read(k, row);
        add_row<kColumns, kDiagonal, 0, 2 * kRows>(rows[k], row, table);
    }
}

// Row j of `out`, 32 numbers apart, is the sum of the entries that hold player j of the group.
template <int kRows, int kColumns, bool kDiagonal, int kFour = 0>
inline void fold(const double* table, double* out) {
    if constexpr (kFour < 2 * kRows) {
        using L = Layout<kColumns, kDiagonal>;
        for (int player = 0; player < 4; ++player) {
            for (int i = 0; i < L::width(kFour); ++i) {
                const auto entry = [&](int in) {
                    return load(table + L::start(kFour) + (in * L::width(kFour) + i) * 8);
                };
                v8 sum = entry(1 << player);
                for (int in = (1 << player) + 1; in < 16; ++in) {
                    if (in >> player & 1) sum = add(sum, entry(in));
                }
                store(out + (4 * kFour + player) * kGroup + 8 * i, sum);
            }
        }
        fold<kRows, kColumns, kDiagonal, kFour + 1>(table, out);
    }
}

// Calls f with the number, 1 to 4, as a constant.
template <class F>
inline void with_constant(int64_t number, const F& f) {
    switch (number) {
        case 1:
            return f(std::integral_constant<int, 1>());
        case 2:
            return f(std::integral_constant<int, 2>());
        case 3:
            return f(std::integral_constant<int, 3>());
        default:
            return f(std::integral_constant<int, 4>());
    }
}

// Bytes of a group that hold players.
inline int64_t bytes_of(const CoalitionGram& a, int64_t group) {
    const int64_t left = a.p - group * kGroup;
    return left < kGroup ? (left + 7) / 8 : 4;
}

void tile_of(const CoalitionGram& a, int64_t weighting, int64_t row, int64_t column, int64_t begin, int64_t end,
             double* table, double* tile) {
    const Members rows(a, row, begin);
    const Weighted source = {Members(a, column, begin), a.weights + weighting * a.K + begin};
    std::memset(table, 0, kTable * sizeof(double));
    with_constant(bytes_of(a, row), [&](auto bytes) {
        constexpr int kRows = decltype(bytes)::value;
        if (row == column) {
            accumulate<kRows, kRows, true>(rows, source, end - begin, table);
            fold<kRows, kRows, true>(table, tile);
        } else {
            accumulate<kRows, 4, false>(rows, source, end - begin, table);
            fold<kRows, 4, false>(table, tile);
        }
    });
}

// packed [count, width]: weights times values of columns [first, first + columns), explicand by explicand.
inline void pack(const CoalitionGram& a, int64_t first, int64_t columns, int64_t width, int64_t begin, int64_t count,
                 double* packed) {
    for (int64_t c = 0; c < columns;) {
        const int64_t explicand = (first + c) / a.o, output = (first + c) % a.o;
        const int64_t run = a.o - output < columns - c ? a.o - output : columns - c;
        const double* weights = a.weights + (a.g == 1 ? 0 : explicand * a.K) + begin;
        const double* values = a.values + (explicand * a.K + begin) * a.o + output;
        double* to = packed + c;
        for (int64_t k = 0; k < count; ++k, values += a.o, to += width) {
            for (int64_t i = 0; i < run; ++i) to[i] = weights[k] * values[i];
        }
        c += run;
    }
}

void moments_of(const CoalitionGram& a, int64_t first, int64_t columns, int64_t begin, int64_t end, double* scratch,
                double* sums) {
    const int64_t groups = (a.p + kGroup - 1) / kGroup, eights = (columns + 7) / 8;
    double *packed = scratch, *tables = scratch + kPacked * kGroup;
    std::memset(scratch, 0, static_cast<size_t>(kPacked * kGroup + groups * kTable) * sizeof(double));
    with_constant(eights, [&](auto wide) {
        constexpr int kColumns = decltype(wide)::value;
        for (int64_t k = begin; k < end; k += kPacked) {
            const int64_t count = end - k < kPacked ? end - k : kPacked;
            pack(a, first, columns, 8 * kColumns, k, count, packed);
            for (int64_t group = 0; group < groups; ++group) {
                with_constant(bytes_of(a, group), [&](auto bytes) {
                    accumulate<decltype(bytes)::value, kColumns, false>(Members(a, group, k), Packed{packed}, count,
                                                                        tables + group * kTable);
                });
            }
        }
        for (int64_t group = 0; group < groups; ++group) {
            with_constant(bytes_of(a, group), [&](auto bytes) {
                fold<decltype(bytes)::value, kColumns, false>(tables + group * kTable,
                                                              sums + (1 + group * kGroup) * kGroup);
            });
        }
        for (int i = 0; i < kColumns; ++i) {  // the constant is in every entry of the first four
            v8 sum = load(tables + 8 * i);
            for (int in = 1; in < 16; ++in) sum = add(sum, load(tables + (in * kColumns + i) * 8));
            store(sums + 8 * i, sum);
        }
    });
}

constexpr CoalitionGramKernels kKernels = {tile_of, moments_of};

}  // namespace
}  // namespace microtome::cpu
