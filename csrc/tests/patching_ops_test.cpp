// cascade_attention, swap_key_attention and patch_rows at every level: against double, and bit for bit between the
// levels that have fma. And the vector functions they rest on, at the portable level.
#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "common/vector_math.h"
#include "cpu/cascade_attention.h"
#include "cpu/patch_rows.h"

namespace microtome::test {
namespace {

struct Shape {
    int64_t h, hk, dh, dv, t, window;
    float softcap;
};

// One base run of t tokens; rows of 1, 4 and t / 2 tokens that join it at t - 1, t / 3 and t; every other one a query.
struct Problem {
    Shape s;
    std::vector<float> q, k, v, k_base, v_base;
    std::vector<int32_t> rows, positions, first;
};

Problem make(const Shape& s) {
    Problem p{s, {}, {}, {}, normal(s.t * s.hk * s.dh, 1), normal(s.t * s.hk * s.dv, 2), {}, {}, {2}};
    int64_t T = 0, Tq = 0;
    for (const auto& [start, count] : {std::pair{s.t - 1, int64_t{1}}, {s.t / 3, int64_t{4}}, {s.t, s.t / 2}}) {
        const int64_t queries = (count + 1) / 2;
        for (int64_t x : {int64_t{0}, start, T, count, Tq, queries}) p.rows.push_back(static_cast<int32_t>(x));
        for (int64_t j = 0; j < queries; ++j) p.positions.push_back(static_cast<int32_t>(start + 2 * j));
        T += count;
        Tq += queries;
    }
    p.q = normal(Tq * s.h * s.dh, 3);
    p.k = normal(T * s.hk * s.dh, 4);
    p.v = normal(T * s.hk * s.dv, 5);
    return p;
}

cpu::Heads view(const std::vector<float>& x, int64_t heads, int64_t width, int64_t example = 0) {
    return {x.data(), example, heads * width, width};
}

// Attention in double of one query head over keys and values given by position.
std::vector<double> attend(const float* q, const Shape& s, int64_t from, int64_t position,
                           const std::vector<const float*>& keys, const std::vector<const float*>& values) {
    std::vector<double> scores, z(static_cast<size_t>(s.dv + 1), 0.0);
    for (int64_t x = from; x <= position; ++x) {
        double score = 0;
        for (int64_t c = 0; c < s.dh; ++c) score += static_cast<double>(q[c]) * keys[x][c];
        score *= 0.25;
        if (s.softcap > 0) score = s.softcap * std::tanh(score / s.softcap);
        scores.push_back(score);
    }
    double sum = 0;
    for (double score : scores) sum += std::exp(score);
    z[s.dv] = std::log(sum);
    for (int64_t x = from; x <= position; ++x) {
        for (int64_t c = 0; c < s.dv; ++c) z[c] += std::exp(scores[x - from]) / sum * values[x][c];
    }
    return z;
}

int64_t lowest(const Shape& s, int64_t position) {
    return std::max<int64_t>(2, s.window > 0 ? position - s.window + 1 : 0);
}

void check_against_double(const Problem& p, const std::vector<float>& z, const std::vector<float>& lse) {
    const Shape& s = p.s;
    for (size_t r = 0; r < p.rows.size(); r += 6) {
        const int64_t start = p.rows[r + 1], kv_at = p.rows[r + 2], count = p.rows[r + 3], q_at = p.rows[r + 4];
        for (int64_t j = q_at; j < q_at + p.rows[r + 5]; ++j) {
            for (int64_t head = 0; head < s.h; ++head) {
                const int64_t g = head / (s.h / s.hk), position = p.positions[j];
                std::vector<const float*> keys, values;
                for (int64_t x = 0; x < start + count; ++x) {
                    const bool own = x >= start;
                    const int64_t at = ((own ? kv_at + x - start : x) * s.hk + g);
                    keys.push_back((own ? p.k : p.k_base).data() + at * s.dh);
                    values.push_back((own ? p.v : p.v_base).data() + at * s.dv);
                }
                const auto exact =
                    attend(p.q.data() + (j * s.h + head) * s.dh, s, lowest(s, position), position, keys, values);
                const double got = lse[j * s.h + head];  // -inf where nothing is seen
                CHECK(exact[s.dv] == got || std::fabs(exact[s.dv] - got) < 1e-5);
                for (int64_t c = 0; c < s.dv; ++c) CHECK(std::fabs(exact[c] - z[(j * s.h + head) * s.dv + c]) < 1e-5);
            }
        }
    }
}

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 5, 0, 0},    {2, 2, 16, 16, 40, 0, 0},   {6, 2, 19, 33, 37, 0, 3},
    {5, 1, 67, 5, 150, 9, 0}, {3, 3, 8, 80, 300, 140, 0},
};

}  // namespace

void vector_functions_are_within_their_bounds() {
    float in[kWidth], e[kWidth], t[kWidth], l[kWidth], m[kWidth], u[kWidth], p[kWidth], n[kWidth];
    const auto ulp = [](double x) { return std::nextafter(static_cast<float>(x), INFINITY) - static_cast<float>(x); };
    for (float x = -87; x < 88; x += 0.0137f) {
        for (int j = 0; j < kWidth; ++j) in[j] = x + 0.003f * static_cast<float>(j);
        store(e, exp(load(in)));
        store(t, tanh(mul(set1(0.125f), load(in))));
        store(l, log(add(set1(1.0f), mul(load(in), load(in)))));
        store(m, expm1(load(in)));
        store(u, exp(sub(zero(), magnitude(load(in)))));
        store(p, log1p(load(u)));
        store(n, normal_tail(mul(set1(-0.0909f), magnitude(load(in)))));
        for (int j = 0; j < kWidth; ++j) {
            const double wide = in[j], tanh_exact = std::tanh(0.125 * wide);
            CHECK(std::fabs(e[j] - std::exp(wide)) <= 2 * ulp(std::exp(wide)));
            CHECK(std::fabs(t[j] - tanh_exact) <= 3 * ulp(std::fabs(tanh_exact)));
            const double log_exact = std::log(static_cast<double>(1.0f + in[j] * in[j]));
            CHECK(std::fabs(l[j] - log_exact) <= 6e-8 + ulp(log_exact));
            CHECK(std::fabs(m[j] - std::expm1(wide)) <= 2 * ulp(std::fabs(std::expm1(wide))));
            const double log1p_exact = std::log1p(static_cast<double>(u[j]));
            CHECK(std::fabs(p[j] - log1p_exact) <= 3 * ulp(log1p_exact));
            const double t = static_cast<double>(-0.0909f * std::fabs(in[j]));
            CHECK(std::fabs(n[j] - std::erfc(-t / std::sqrt(2.0)) / 2) <= 6e-8);
        }
    }
}

void attention_reads_the_right_keys_at_every_level() {
    for (const Shape& s : kShapes) {
        const Problem p = make(s);
        const auto T = static_cast<int64_t>(p.k.size()) / (s.hk * s.dh), Tq = static_cast<int64_t>(p.positions.size());
        std::vector<float> usual;
        for (Isa level : levels()) {
            for (int threads : {1, 3}) {
                std::vector<float> z(static_cast<size_t>(Tq * s.h * s.dv), NAN),
                    lse(static_cast<size_t>(Tq * s.h), NAN);
                const auto problem = cpu::cascade_attention({view(p.q, s.h, s.dh),
                                                             view(p.k, s.hk, s.dh),
                                                             view(p.v, s.hk, s.dv),
                                                             view(p.k_base, s.hk, s.dh),
                                                             view(p.v_base, s.hk, s.dv),
                                                             p.rows.data(),
                                                             p.positions.data(),
                                                             p.first.data(),
                                                             Tq,
                                                             T,
                                                             3,
                                                             1,
                                                             s.t,
                                                             s.h,
                                                             s.hk,
                                                             s.dh,
                                                             s.dv,
                                                             s.window,
                                                             0.25f,
                                                             s.softcap,
                                                             z.data(),
                                                             lse.data()},
                                                            isa_name(level), threads);
                CHECK(problem.first == 0);
                check_against_double(p, z, lse);
                if (level == Isa::kAvx2 && usual.empty()) usual = z;
                if (level >= Isa::kAvx2) CHECK(z == usual);
            }
        }
    }
}

void one_swapped_key_answers_as_a_whole_run_at_every_level() {
    for (const Shape& s : kShapes) {
        const auto q = normal(s.t * s.h * s.dh, 6), k = normal(s.t * s.hk * s.dh, 1), v = normal(s.t * s.hk * s.dv, 2);
        const auto q_new = normal(2 * s.h * s.dh, 7), k_new = normal(2 * s.hk * s.dh, 8),
                   v_new = normal(2 * s.hk * s.dv, 9);
        const auto t = static_cast<int32_t>(s.t);
        const std::vector<int32_t> whole = {0, 0, 0, t, 0, t}, rows = {0, 1, t, 0, t / 2, t - 1}, first = {2};
        std::vector<int32_t> positions;
        for (int32_t x = 0; x < t; ++x) positions.push_back(x);
        for (Isa level : levels()) {
            std::vector<float> z(static_cast<size_t>(s.t * s.h * s.dv)), lse(static_cast<size_t>(s.t * s.h));
            const cpu::Heads keys = view(k, s.hk, s.dh), values = view(v, s.hk, s.dv), queries = view(q, s.h, s.dh);
            cpu::cascade_attention({queries,
                                    keys,
                                    values,
                                    keys,
                                    values,
                                    whole.data(),
                                    positions.data(),
                                    first.data(),
                                    s.t,
                                    s.t,
                                    1,
                                    1,
                                    0,
                                    s.h,
                                    s.hk,
                                    s.dh,
                                    s.dv,
                                    s.window,
                                    0.25f,
                                    s.softcap,
                                    z.data(),
                                    lse.data()},
                                   isa_name(level), 2);
            const int64_t total = s.t - 1 + s.t - 1 - s.t / 2;
            std::vector<float> out(static_cast<size_t>(total * s.h * s.dv), NAN);
            const auto problem = cpu::swap_key_attention({view(z, s.h, s.dv),
                                                          view(lse, s.h, 1),
                                                          queries,
                                                          keys,
                                                          values,
                                                          view(q_new, s.h, s.dh),
                                                          view(k_new, s.hk, s.dh),
                                                          view(v_new, s.hk, s.dv),
                                                          rows.data(),
                                                          first.data(),
                                                          total,
                                                          2,
                                                          1,
                                                          s.t,
                                                          s.h,
                                                          s.hk,
                                                          s.dh,
                                                          s.dv,
                                                          s.window,
                                                          0.25f,
                                                          s.softcap,
                                                          out.data()},
                                                         isa_name(level), 2);
            CHECK(problem.first == 0);
            int64_t token = 0;
            for (int64_t r = 0; r < 2; ++r) {
                for (int64_t i = rows[r * 3 + 1]; i < rows[r * 3 + 2]; ++i, ++token) {
                    for (int64_t head = 0; head < s.h; ++head) {
                        const int64_t g = head / (s.h / s.hk), position = rows[r * 3 + 1];
                        std::vector<const float*> row_keys, row_values;
                        for (int64_t x = 0; x < s.t; ++x) {
                            const bool own = x == position;
                            row_keys.push_back(own ? k_new.data() + (r * s.hk + g) * s.dh
                                                   : k.data() + (x * s.hk + g) * s.dh);
                            row_values.push_back(own ? v_new.data() + (r * s.hk + g) * s.dv
                                                     : v.data() + (x * s.hk + g) * s.dv);
                        }
                        const float* query =
                            i == position ? q_new.data() + (r * s.h + head) * s.dh : q.data() + (i * s.h + head) * s.dh;
                        const auto exact = attend(query, s, lowest(s, i), i, row_keys, row_values);
                        for (int64_t c = 0; c < s.dv; ++c) {
                            const double expected = lowest(s, i) > i ? 0.0 : exact[c];
                            CHECK(std::fabs(expected - out[(token * s.h + head) * s.dv + c]) < 1e-5);
                        }
                    }
                }
            }
        }
    }
}

void patches_land_where_the_table_says() {
    constexpr int64_t t = 50, w = 37;
    const auto base = normal(2 * t * w, 1), sources = normal(3 * w, 2), factors = normal(4, 3);
    const std::vector<int32_t> rows = {1, 0, t, 0, 49, 50, 1, 7, 7, 0, 20, 45};
    const std::vector<int32_t> table = {0, 49, 0,  w,  2,  0, 3, 20, 5, 30, 0,  1,
                                        1, 49, 36, 37, -1, 2, 0, 49, 3, 4,  -1, 3};
    for (int threads : {1, 2, 5}) {
        std::vector<float> out(76 * w, NAN);
        const auto problem = cpu::patch_rows({base.data(), t * w, w, sources.data(), w, rows.data(), table.data(),
                                              factors.data(), 76, 4, 4, 2, t, w, 3, w, out.data()},
                                             threads);
        CHECK(problem.first == 0);
        for (int64_t c = 0; c < w; ++c) {
            const float put = factors[0] * sources[2 * w + c];
            CHECK(out[49 * w + c] == (c == 3 ? put * factors[3] : put));
            const float old = base[20 * w + c];
            CHECK(out[51 * w + c] == (c >= 5 && c < 30 ? old + factors[1] * sources[c] : old));
            CHECK(out[50 * w + c] == (c == 36 ? 0.0f : base[49 * w + c]));
        }
    }
}

}  // namespace microtome::test
