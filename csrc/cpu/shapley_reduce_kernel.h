// The kernel of shapley_reduce, compiled once per instruction set. See simd.h for the rules of such files.
//
// Every sum runs over orders, then units, in turn, one player and output to itself: the bits depend neither on the
// instruction set nor on what a thread was given.
#pragma once

#include "cpu/shapley_reduce.h"

namespace microtome::cpu {
namespace {

// What every place of a walk adds, n of them: gain[i] = v[i + next] - v[i], or its mean with the walk back.
template <class T>
inline void gains(const T* v, int64_t next, int64_t back, bool paired, int64_t n, double* __restrict gain) {
    for (int64_t i = 0; i < n; ++i) gain[i] = static_cast<double>(v[i + next]) - static_cast<double>(v[i]);
    if (!paired) return;
    const T* w = v + back;
    for (int64_t i = 0; i < n; ++i) {
        gain[i] = (gain[i] + (static_cast<double>(w[i]) - static_cast<double>(w[i + next]))) * 0.5;
    }
}

// unit [p, width] = the mean over the orders of unit u of what each player adds to outputs [begin, begin + width).
template <class T>
inline void unit_mean(const ShapleyReduce<T>& a, int64_t explicand, int64_t s, int64_t u, int64_t begin, int64_t width,
                      double* __restrict gain, double* __restrict unit) {
    const int64_t p = a.p, o = a.o, size = p * width, points = a.paired ? 2 * p + 1 : p + 1;
    const int64_t first = ((explicand * a.S + s) * a.U + u) * a.A;
    const T* v = a.values + first * points * o + begin;
    const int32_t* rank = a.ranks + (s * a.U + u) * a.A * p;
    for (int64_t i = 0; i < size; ++i) unit[i] = 0.0;
    for (int64_t order = 0; order < a.A; ++order, v += points * o, rank += p) {
        if (width == o) {
            gains(v, o, p * o, a.paired, size, gain);
        } else {
            for (int64_t t = 0; t < p; ++t) gains(v + t * o, o, p * o, a.paired, width, gain + t * width);
        }
        if (width == 1) {
            for (int64_t j = 0; j < p; ++j) unit[j] += gain[rank[j]];
            continue;
        }
        for (int64_t j = 0; j < p; ++j) {
            const double* from = gain + rank[j] * width;
            for (int64_t c = 0; c < width; ++c) unit[j * width + c] += from[c];
        }
    }
    if (a.A == 1) return;
    const double orders = static_cast<double>(a.A);
    for (int64_t i = 0; i < size; ++i) unit[i] /= orders;
}

template <class T>
void reduce_stratum(const ShapleyReduce<T>& a, int64_t explicand, int64_t s, int64_t begin, int64_t end,
                    double* scratch) {
    const int64_t width = end - begin, size = a.p * width;
    const bool keep = a.U * size <= kKeptUnits;
    double *gain = scratch, *mean = gain + size, *m2 = mean + size, *units = m2 + size;
    const auto unit_of = [&](int64_t u) { return units + (keep ? u * size : 0); };
    for (int64_t i = 0; i < size; ++i) mean[i] = m2[i] = 0.0;
    for (int64_t u = 0; u < a.U; ++u) {
        double* unit = unit_of(u);
        unit_mean(a, explicand, s, u, begin, width, gain, unit);
        for (int64_t i = 0; i < size; ++i) mean[i] += unit[i];
    }
    const double count = static_cast<double>(a.U);
    for (int64_t i = 0; i < size; ++i) mean[i] /= count;
    for (int64_t u = 0; u < a.U; ++u) {
        double* unit = unit_of(u);
        if (!keep) unit_mean(a, explicand, s, u, begin, width, gain, unit);
        for (int64_t i = 0; i < size; ++i) m2[i] += (unit[i] - mean[i]) * (unit[i] - mean[i]);
    }
    const int64_t out = (explicand * a.S + s) * a.p * a.o + begin;
    for (int64_t j = 0; j < a.p; ++j) {
        for (int64_t c = 0; c < width; ++c) {
            a.mean[out + j * a.o + c] = mean[j * width + c];
            a.m2[out + j * a.o + c] = m2[j * width + c];
        }
    }
}

constexpr ShapleyReduceKernels kKernels = {reduce_stratum<float>, reduce_stratum<double>};

}  // namespace
}  // namespace microtome::cpu
