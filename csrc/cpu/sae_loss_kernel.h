// The kernel of sae_loss, compiled once per instruction set. See simd.h for the rules of such files.
#pragma once

#include "common/gather.h"
#include "cpu/sae_loss.h"

namespace microtome::cpu {
namespace {

// While a row's dot products read its weights from the second-level cache, the next row's are fetched into what is
// left of it.
constexpr int64_t kFetchBytes = 192 * 1024;

// e = acc + b - x.
template <class T>
inline void subtract(float* acc, const T* b, const T* x, int64_t d) {
    int64_t i = 0;
    for (; i + kWidth <= d; i += kWidth) {
        const vf out = b ? add(load(acc + i), load(b + i)) : load(acc + i);
        store(acc + i, sub(out, load(x + i)));
    }
    for (; i < d; ++i) acc[i] = (b ? acc[i] + widen(b[i]) : acc[i]) - widen(x[i]);
}

// grad = 2 e, kept in float32 and written narrowed.
template <class T>
inline void twice(T* out, float* e, int64_t d) {
    int64_t i = 0;
    for (; i + kWidth <= d; i += kWidth) {
        const vf grad = add(load(e + i), load(e + i));
        store(e + i, grad);
        store(out + i, grad);
    }
    for (; i < d; ++i) {
        e[i] += e[i];
        narrow(e[i], out + i);
    }
}

template <class T>
void loss_rows(const SaeLossArguments<T>& a, float* e, int64_t begin, int64_t end) {
    const int64_t k = a.k, d = a.d;
    const bool fetch = k <= kChunk && k * d * static_cast<int64_t>(sizeof(T)) <= kFetchBytes;
    Entries<T> entries, later;
    float dots[kChunk];
    for (int64_t i = begin; i < end; ++i) {
        if (k == 0) add_rows(e, true, entries, 0, d);
        for (int64_t j = 0; j < k; j += kChunk) {
            const int64_t count = k - j < kChunk ? k - j : kChunk;
            gather(entries, a.values, a.indices, a.W, i * k + j, count, end * k, d);
            add_rows(e, j == 0, entries, count, d);
        }
        subtract(e, a.b, a.x + i * d, d);
        a.sse[i] = dot(e, e, d);
        twice(a.grad_out + i * d, e, d);
        for (int64_t j = 0; j < k; j += kChunk) {
            const int64_t count = k - j < kChunk ? k - j : kChunk;
            const T* const* ahead = entries.row + kGroup;
            if (k > kChunk) gather<T>(entries, nullptr, a.indices, a.W, i * k + j, count, end * k, d);
            if (fetch && i + 1 < end) {
                gather<T>(later, nullptr, a.indices, a.W, (i + 1) * k, count, end * k, d);
                ahead = later.row;
            }
            dot_rows(dots, e, entries.row, ahead, count, d);
            for (int64_t t = 0; t < count; ++t) {
                const int64_t at = i * k + j + t;
                narrow(widen(a.values[at]) == 0.0f ? 0.0f : dots[t], a.grad_values + at);
            }
        }
    }
}

}  // namespace
}  // namespace microtome::cpu
