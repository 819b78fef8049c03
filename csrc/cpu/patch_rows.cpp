// One build for all processors: the work is a copy, which the C library does at the width of the machine, and a few
// short products. Products are rounded before they are added (the build forbids contraction), as every backend does.
#include "cpu/patch_rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/parallel.h"

namespace microtome::cpu {
namespace {

enum Op : int32_t { kReplace, kAdd, kZero, kScale };
enum Code : int64_t { kExample = 1, kSpan, kTotal, kRow, kPosition, kColumns, kOp, kSource, kWidth };

struct Entry {
    int64_t row, position, lo, hi, source;
    int32_t op;
};

Entry entry_of(const PatchArguments& a, int64_t e) {
    const int32_t* entry = a.table + e * 6;
    return {entry[0], entry[1], entry[2], entry[3], entry[4], entry[5]};
}

int64_t problem_of(const PatchArguments& a, const Entry& e) {
    if (e.row < 0 || e.row >= a.n) return kRow;
    if (e.position < a.rows[e.row * 3 + 1] || e.position >= a.rows[e.row * 3 + 2]) return kPosition;
    if (e.lo < 0 || e.lo > e.hi || e.hi > a.w) return kColumns;
    if (e.op < kReplace || e.op > kScale) return kOp;
    if (e.op >= kZero) return 0;
    if (e.source < 0 || e.source >= a.S) return kSource;
    return a.w_s != a.w && e.hi - e.lo > a.w_s ? kWidth : 0;
}

// The lowest code and the first row or entry that has it; fills the packed place of each row's first token.
std::pair<int64_t, int64_t> check(const PatchArguments& a, std::vector<int64_t>& place) {
    std::pair<int64_t, int64_t> found{0, 0};
    const auto note = [&](int64_t code, int64_t at) {
        if (code && (!found.first || code < found.first)) found = {code, at};
    };
    for (int64_t r = 0; r < a.n; ++r) {
        const int64_t example = a.rows[r * 3], start = a.rows[r * 3 + 1], stop = a.rows[r * 3 + 2];
        note(example < 0 || example >= a.b ? kExample : 0, r);
        note(start < 0 || start > stop || stop > a.t ? kSpan : 0, r);
        place[r + 1] = place[r] + stop - start;
    }
    note(place[a.n] != a.total ? kTotal : 0, 0);
    if (found.first) return found;
    for (int64_t e = 0; e < a.m; ++e) note(problem_of(a, entry_of(a, e)), e);
    return found;
}

void apply(const PatchArguments& a, const Entry& e, float factor, float* token) {
    float* out = token + e.lo;
    const int64_t count = e.hi - e.lo;
    const float* src = e.op >= kZero ? nullptr : a.sources + e.source * a.source + (a.w_s == a.w ? e.lo : 0);
    if (e.op == kReplace) {
        for (int64_t c = 0; c < count; ++c) out[c] = factor * src[c];
    } else if (e.op == kAdd) {
        for (int64_t c = 0; c < count; ++c) out[c] = out[c] + factor * src[c];
    } else if (e.op == kZero) {
        std::memset(out, 0, static_cast<size_t>(count) * sizeof(float));
    } else {
        for (int64_t c = 0; c < count; ++c) out[c] = out[c] * factor;
    }
}

// Packed tokens [begin, end): first the copies, then the entries that fall on them, in table order.
void patch(const PatchArguments& a, const std::vector<int64_t>& place, int64_t begin, int64_t end) {
    int64_t r = std::upper_bound(place.begin(), place.end(), begin) - place.begin() - 1;
    for (int64_t at = begin; at < end; ++r) {
        const int64_t stop = std::min(place[r + 1], end), position = a.rows[r * 3 + 1] + at - place[r];
        const float* from = a.base + a.rows[r * 3] * a.example + position * a.token;
        for (; at < stop; ++at, from += a.token) {
            std::memcpy(a.out + at * a.w, from, static_cast<size_t>(a.w) * sizeof(float));
        }
    }
    for (int64_t i = 0; i < a.m; ++i) {
        const Entry e = entry_of(a, i);
        const int64_t at = place[e.row] + e.position - a.rows[e.row * 3 + 1];
        if (at >= begin && at < end) apply(a, e, a.factors[i], a.out + at * a.w);
    }
}

}  // namespace

std::pair<int64_t, int64_t> patch_rows(const PatchArguments& a, int threads) {
    std::vector<int64_t> place(static_cast<size_t>(a.n + 1), 0);
    const auto problem = check(a, place);
    if (problem.first || a.total == 0) return problem;
    constexpr int64_t kWorthATeam = 1 << 15;  // numbers a thread copies in about the time it takes to start
    const int team = static_cast<int>(std::clamp<int64_t>(a.total * a.w / kWorthATeam, 1, threads));
#pragma omp parallel num_threads(team)
    {
        const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
        patch(a, place, a.total * t / of, a.total * (t + 1) / of);
    }
    return problem;
}

}  // namespace microtome::cpu
