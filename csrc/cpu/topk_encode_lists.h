// A row's list of hits: pruned while it grows, and its best picked at the end. Included by each level's file;
// everything is in an anonymous namespace.
#pragma once

#include "common/simd.h"
#include "cpu/topk_encode.h"

namespace microtome::cpu {
namespace {

constexpr int32_t kLeastGrowth = 64;  // hits between two prunings of a list

// A float's bits as an integer of the same order, and back.
inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

inline int32_t ordered_of(float a) {
    int32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    return ordered(bits);
}

inline float float_of(int64_t key) {
    const int32_t bits = ordered(static_cast<int32_t>(key));
    float a;
    std::memcpy(&a, &bits, sizeof a);
    return a;
}

// How many of n numbers, padded with -inf to whole vectors, are not below `least`.
inline int64_t reaching(const float* numbers, int64_t n, float least) {
    const vf bound = set1(least);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kWidth) count += __builtin_popcount(not_less(load(numbers + i), bound));
    return count;
}

// A bound that the k largest lower bounds of a list reach, and no other unless it equals the k-th: found by halving the
// range of floats between `floor`, which k are known to reach, and the largest. A NaN reaches nothing.
// `scratch` has room for n floats and a vector more.
inline float bound_of_best(const Hit* hits, int64_t n, int64_t k, float floor, float* scratch) {
    const float lowest = -__builtin_inff();
    float largest = floor;
    for (int64_t j = 0; j < n; ++j) {
        const float lower = hits[j].lower == hits[j].lower ? hits[j].lower : lowest;
        scratch[j] = lower;
        largest = lower > largest ? lower : largest;
    }
    for (int64_t j = n; j % kWidth; ++j) scratch[j] = lowest;
    int64_t least = ordered_of(floor), most = ordered_of(largest);
    while (least < most) {
        const int64_t middle = least + (most - least + 1) / 2;
        const int64_t count = reaching(scratch, n, float_of(middle));
        if (count == k) return float_of(middle);
        if (count > k) {
            least = middle;
        } else {
            most = middle - 1;
        }
    }
    return float_of(least);
}

// Drop the hits whose upper bound lies below a bound that k features reach; returns how many are left, in order.
inline int64_t dropped_below(Hit* hits, int64_t n, float bound) {
    int64_t kept = 0;
    for (int64_t j = 0; j < n; ++j) {  // without branches: either way is as likely
        const Hit hit = hits[j];
        hits[kept] = hit;
        kept += !(hit.upper < bound);
    }
    return kept;
}

// Called when a row's list is full.
void prune_bounds(const Screening& s, int64_t row) {
    Hit* hits = s.hits + row * s.capacity;
    const int64_t n = s.count[row];
    const float bound = bound_of_best(hits, n, s.k, s.threshold[row], s.scratch);
    const int32_t kept = static_cast<int32_t>(dropped_below(hits, n, bound));
    const int32_t limit = kept + (kept / 2 > kLeastGrowth ? kept / 2 : kLeastGrowth);
    s.threshold[row] = bound;
    s.count[row] = kept;
    s.limit[row] = limit < s.capacity ? limit : static_cast<int32_t>(s.capacity);
    if (kept + kLeastGrowth > s.capacity) {
        s.threshold[row] = __builtin_inff();
        s.count[row] = -1;
    }
}

// The k hits with the largest lower bounds to the front, then those that may still belong to the k; returns how many.
int64_t best_first(Hit* hits, int64_t n, int64_t k, float floor, float* scratch) {
    const float bound = bound_of_best(hits, n, k, floor, scratch);
    const int64_t kept = dropped_below(hits, n, bound);
    int64_t front = 0;
    for (int64_t j = 0; j < kept && front < k; ++j) {
        if (!(hits[j].lower >= bound)) continue;
        const Hit hit = hits[j];
        hits[j] = hits[front];
        hits[front++] = hit;
    }
    return kept;
}

}  // namespace
}  // namespace microtome::cpu
