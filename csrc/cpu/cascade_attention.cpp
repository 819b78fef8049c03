#include "cpu/cascade_attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/cascade_attention_kernel.h"

namespace microtome::cpu {
namespace {

enum Code : int64_t { kExample = 1, kStart, kKeysRange, kQueries, kCover, kPosition, kSpan, kTotal };

const AttentionKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa.c_str());
    if (level >= Isa::kAvx512) return kAttentionAvx512;
    if (level == Isa::kAvx2) return kAttentionAvx2;
#else
    static_cast<void>(isa);
#endif
    static constexpr AttentionKernels generic = kKernels;
    return generic;
}

struct Row {
    int64_t example, start, kv_at, kv_count, q_at, q_count;
};

Row row_of(const CascadeArguments& a, int64_t r) {
    const int32_t* row = a.rows + r * 6;
    return {row[0], row[1], row[2], row[3], row[4], row[5]};
}

int64_t problem_of(const CascadeArguments& a, const Row& row) {
    if (a.b > 0 && (row.example < 0 || row.example >= a.b)) return kExample;
    const int64_t reach = a.b > 0 ? std::max<int64_t>(a.t, a.first[row.example]) : 0;
    if (row.start < 0 || row.start > reach) return kStart;
    if (row.kv_at < 0 || row.kv_count < 0 || row.kv_at + row.kv_count > a.T) return kKeysRange;
    if (row.q_at < 0 || row.q_count < 0 || row.q_at + row.q_count > a.Tq) return kQueries;
    return 0;
}

// The lowest code, and the first row or query that has it.
Problem check(const CascadeArguments& a) {
    Problem found{0, 0};
    for (int64_t r = 0; r < a.n; ++r) {
        const int64_t code = problem_of(a, row_of(a, r));
        if (code && (!found.first || code < found.first)) found = {code, r};
    }
    if (found.first) return found;
    std::vector<uint8_t> owners(static_cast<size_t>(a.Tq), 0);
    int64_t outside = a.Tq;
    for (int64_t r = 0; r < a.n; ++r) {
        const Row row = row_of(a, r);
        for (int64_t j = row.q_at; j < row.q_at + row.q_count; ++j) {
            const int64_t position = a.q_positions[j];
            owners[j] = static_cast<uint8_t>(std::min(owners[j] + 1, 2));
            if (position < row.start || position >= row.start + row.kv_count) outside = std::min(outside, j);
        }
    }
    const auto uncovered = std::find_if(owners.begin(), owners.end(), [](uint8_t count) { return count != 1; });
    if (uncovered != owners.end()) return {kCover, uncovered - owners.begin()};
    if (outside < a.Tq) return {kPosition, outside};
    return {0, 0};
}

// The panels of each example that some row reads: their places, and whose they are in one list.
struct Panels {
    std::vector<int64_t> offset, low, count, example;
    std::unique_ptr<float[]> data;

    explicit Panels(int64_t b) : offset(static_cast<size_t>(b)), low(offset.size(), INT64_MAX), count(offset.size()) {}

    // Panels [from, to) of example e are wanted; `count` is an end until `reserve`.
    void want(int64_t e, int64_t from, int64_t to) {
        if (from >= to) return;
        low[e] = std::min(low[e], from);
        count[e] = std::max(count[e], to);
    }
    void reserve(int64_t heads, int64_t width) {
        for (size_t e = 0; e < low.size(); ++e) {
            if (count[e] > 0) count[e] -= low[e];
            offset[e] = static_cast<int64_t>(example.size());
            example.insert(example.end(), static_cast<size_t>(count[e]), static_cast<int64_t>(e));
        }
        data.reset(new float[example.size() * static_cast<size_t>(heads * width * kPanel)]);
    }
    BasePanels view() const { return {data.get(), offset.data(), low.data(), count.data()}; }
    int64_t size() const { return static_cast<int64_t>(example.size()); }
    int64_t number(int64_t p) const { return low[example[p]] + p - offset[example[p]]; }
};

int64_t lowest_read(const int32_t* first, int64_t window, int64_t e, int64_t position) {
    const int64_t from = std::max<int64_t>(first[e], 0);
    return window > 0 ? std::max(from, position - window + 1) : from;
}

// Rows cut into pieces of at most kPairs pairs, and the pieces gathered into tasks of about as many: piece numbers at
// which a task begins. A matter of the rows alone, so that no sum depends on the threads.
void cut(const CascadeArguments& a, std::vector<Piece>& pieces, std::vector<int64_t>& tasks) {
    const int64_t group = a.h / a.hk;
    int64_t gathered = kPairs;
    for (int64_t r = 0; r < a.n; ++r) {
        const int64_t pairs = row_of(a, r).q_count * group;
        for (int64_t begin = 0; begin < pairs; begin += kPairs) {
            const int64_t end = std::min(begin + kPairs, pairs);
            if (gathered + end - begin > kPairs) {
                tasks.push_back(static_cast<int64_t>(pieces.size()));
                gathered = 0;
            }
            gathered += end - begin;
            pieces.push_back({r, begin, end});
        }
    }
    tasks.push_back(static_cast<int64_t>(pieces.size()));
}

}  // namespace

Problem cascade_attention(const CascadeArguments& a, const std::string& isa, int threads) {
    const Problem problem = check(a);
    if (problem.first || a.Tq == 0) return problem;
    const AttentionKernels& run = kernels(isa);
    Panels panels(a.b);
    for (int64_t r = 0; r < a.n && a.b > 0; ++r) {
        const Row row = row_of(a, r);
        if (row.q_count == 0) continue;
        const int64_t from = lowest_read(a.first, a.window, row.example, row.start);
        panels.want(row.example, from / kPanel, std::min(row.start, a.t) / kPanel);
    }
    panels.reserve(a.hk, a.dh);
    const BasePanels keys = panels.view();
    std::vector<Piece> pieces;
    std::vector<int64_t> tasks;
    cut(a, pieces, tasks);
    const int64_t groups = static_cast<int64_t>(tasks.size()) - 1;
    const int team = static_cast<int>(std::clamp<int64_t>(groups * a.hk, 1, threads));
    const int64_t scratch_floats = run.scratch(a.dh, a.dv);
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(scratch_floats * team)]);
#pragma omp parallel num_threads(team)
    {
        float* own = scratch.get() + scratch_floats * omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels.size(); ++p) {
            run.pack(a.k_base, a.t, a.hk, a.dh, keys, panels.example[p], panels.number(p), own);
        }
        // One key head of several rows at a time: the rows' shared prefix stays in the cache.
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < groups * a.hk; ++task) {
            for (int64_t piece = tasks[task / a.hk]; piece < tasks[task / a.hk + 1]; ++piece) {
                const bool more = piece + 1 < tasks[task / a.hk + 1];
                run.attend(a, keys, pieces[piece], more ? &pieces[piece + 1] : nullptr, task % a.hk, own);
            }
        }
    }
    return problem;
}

Problem swap_key_attention(const SwapArguments& a, const std::string& isa, int threads) {
    std::vector<int64_t> token(static_cast<size_t>(a.n + 1), 0);
    Problem span{0, 0};
    for (int64_t r = 0; r < a.n; ++r) {
        const int64_t e = a.rows[r * 3], position = a.rows[r * 3 + 1], stop = a.rows[r * 3 + 2];
        if (e < 0 || e >= a.b) return {kExample, r};
        if (!span.first && (position < 0 || position > stop || stop > a.t)) span = {kSpan, r};
        token[r + 1] = token[r] + stop - position;
    }
    if (span.first) return span;
    if (token[a.n] != a.total) return {kTotal, 0};
    if (a.total == 0) return {0, 0};
    const AttentionKernels& run = kernels(isa);
    Panels keys(a.b), queries(a.b);
    for (int64_t r = 0; r < a.n; ++r) {
        const int64_t e = a.rows[r * 3], position = a.rows[r * 3 + 1], stop = a.rows[r * 3 + 2];
        const int64_t from = lowest_read(a.first, a.window, e, position), end = (stop + kPanel - 1) / kPanel;
        keys.want(e, std::min(from, position) / kPanel, end);
        queries.want(e, (position + 1) / kPanel, end);
    }
    keys.reserve(a.hk, a.dh);
    queries.reserve(a.h, a.dh);
    const BasePanels key_panels = keys.view(), query_panels = queries.view();
    const int team = static_cast<int>(std::clamp<int64_t>(a.n * a.hk, 1, threads));
    const int64_t scratch_floats = run.scratch(a.dh, a.dv);
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(scratch_floats * team)]);
#pragma omp parallel num_threads(team)
    {
        float* own = scratch.get() + scratch_floats * omp_get_thread_num();
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < keys.size(); ++p) {
            run.pack(a.k_base, a.t, a.hk, a.dh, key_panels, keys.example[p], keys.number(p), own);
        }
#pragma omp for schedule(static)
        for (int64_t p = 0; p < queries.size(); ++p) {
            run.pack(a.q, a.t, a.h, a.dh, query_panels, queries.example[p], queries.number(p), own);
        }
        // Head by head: the base run's share of a head stays in the cache.
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < a.n * a.hk; ++task) {
            const int64_t r = task % a.n;
            run.swap(a, key_panels, query_panels, r, task / a.n, token[r], own);
        }
    }
    return {0, 0};
}

}  // namespace microtome::cpu
