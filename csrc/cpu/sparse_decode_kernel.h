// The kernels of sparse_decode, compiled once per instruction set. See simd.h for the rules of such files.
#pragma once

#include "common/gather.h"
#include "cpu/sparse_decode.h"

namespace microtome::cpu {
namespace {

// out = acc + b, narrowed.
template <class T>
inline void finish(T* out, const float* acc, const T* b, int64_t d) {
    int64_t i = 0;
    for (; i + kWidth <= d; i += kWidth) store(out + i, b ? add(load(acc + i), load(b + i)) : load(acc + i));
    for (; i < d; ++i) narrow(b ? acc[i] + widen(b[i]) : acc[i], out + i);
}

template <class T>
void decode_rows(const T* values, const int32_t* indices, const T* W, const T* b, T* out, float* scratch, int64_t begin,
                 int64_t end, int64_t k, int64_t d) {
    Entries<T> entries;
    for (int64_t i = begin; i < end; ++i) {
        if (k == 0) add_rows(scratch, true, entries, 0, d);
        for (int64_t j = 0; j < k; j += kChunk) {
            const int64_t count = k - j < kChunk ? k - j : kChunk;
            gather(entries, values, indices, W, i * k + j, count, end * k, d);
            add_rows(scratch, j == 0, entries, count, d);
        }
        finish(out + i * d, scratch, b, d);
    }
}

template <class T>
void grad_values_rows(const T* grad_out, const int32_t* indices, const T* W, T* out, int64_t begin, int64_t end,
                      int64_t k, int64_t d) {
    Entries<T> entries;
    float dots[kChunk];
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < k; j += kChunk) {
            const int64_t count = k - j < kChunk ? k - j : kChunk;
            gather<T>(entries, nullptr, indices, W, i * k + j, count, end * k, d);
            dot_rows(dots, grad_out + i * d, entries.row, entries.row + kGroup, count, d);
            for (int64_t e = 0; e < count; ++e) narrow(dots[e], out + i * k + j + e);
        }
    }
}

// position / k; the 32-bit division is several times faster on many processors.
inline int64_t row_of(int64_t position, int64_t k) {
    if (position >> 32) return position / k;
    return static_cast<uint32_t>(position) / static_cast<uint32_t>(k);
}

// A long segment is summed in chunks of fixed length, whose sums are added in order.
template <class T>
void grad_W_dec_features(const T* values, const T* grad_out, const int64_t* order, const int64_t* offsets, T* out,
                         float* scratch, int64_t begin, int64_t end, int64_t k, int64_t d) {
    Entries<T> entries;
    float *total = scratch, *part = scratch + padded(d);
    const int64_t last = offsets[end];
    for (int64_t g = begin; g < end; ++g) {
        const int64_t first = offsets[g], stop = offsets[g + 1];
        if (first == stop) {
            std::memset(out + g * d, 0, static_cast<size_t>(d) * sizeof(T));
            continue;
        }
        for (int64_t at = first; at < stop; at += kChunk) {
            const int64_t count = stop - at < kChunk ? stop - at : kChunk;
            for (int64_t e = 0; e < count; ++e) entries.weight[e] = widen(values[order[at + e]]);
            for (int64_t e = 0; e < count + kGroup; ++e) {
                const int64_t from = at + e < last ? at + e : last - 1;
                entries.row[e] = grad_out + row_of(order[from], k) * d;
            }
            add_rows(at == first ? total : part, true, entries, count, d);
            if (at == first) continue;
            for (int64_t i = 0; i < d; ++i) total[i] += part[i];
        }
        finish<T>(out + g * d, total, nullptr, d);
    }
}

template <class T>
constexpr SparseDecodeTable<T> kTable = {decode_rows<T>, grad_values_rows<T>, grad_W_dec_features<T>};

}  // namespace
}  // namespace microtome::cpu
