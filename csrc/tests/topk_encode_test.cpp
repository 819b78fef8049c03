#include "cpu/topk_encode.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "check.h"
#include "cpu/screen_weights.h"

namespace microtome::test {
namespace {

struct Answer {
    std::vector<float> values;
    std::vector<int32_t> indices, candidates;
    int64_t bad_row, bad_feature;
};

struct Input {
    int64_t n, d, f, k;
    std::vector<float> x, weights, bias, center;
};

Input make(int64_t n, int64_t d, int64_t f, int64_t k, unsigned seed) {
    return {n, d, f, k, normal(n * d, seed), normal(f * d, seed + 1), normal(f, seed + 2), normal(d, seed + 3)};
}

Answer run(const Input& in, Isa isa, int threads, bool cached, bool fast = false) {
    Answer out{std::vector<float>(in.n * in.k, NAN), std::vector<int32_t>(in.n * in.k, -1),
               std::vector<int32_t>(in.n, -1), -1, -1};
    const int64_t lines = std::max<int64_t>(1, (in.d + 31) / 32), stride = 32 * (lines | 1);
    std::vector<int16_t> shadow(cached ? in.f * stride : 0);
    std::vector<float> stats(cached ? in.f * 4 : 0);
    if (cached) {
        cpu::screen_weights(address(in.weights), in.f, in.d, stride, cpu::screen_kind(isa), address(shadow),
                            address(stats), isa_name(isa), threads);
    }
    cpu::topk_encode(
        {in.x.data(), in.d, in.weights.data(), in.bias.data(), in.center.data(), in.n, in.d, in.f, in.k, fast,
         cached ? shadow.data() : nullptr, cached ? stats.data() : nullptr, stride, out.values.data(),
         out.indices.data(), out.candidates.data(), &out.bad_row, &out.bad_feature, threads},
        isa);
    return out;
}

// Every returned feature is within `slack` of the k-th best of float64, and its value within `slack` of float64's.
void check_answer(const Input& in, const Answer& a, double slack) {
    CHECK(a.bad_row == -1 && a.bad_feature == -1);
    for (int64_t r = 0; r < in.n; ++r) {
        std::vector<double> z(in.f);
        for (int64_t f = 0; f < in.f; ++f) {
            z[f] = in.bias[f];
            for (int64_t i = 0; i < in.d; ++i) {
                z[f] += static_cast<double>(in.x[r * in.d + i] - in.center[i]) * in.weights[f * in.d + i];
            }
        }
        std::vector<double> sorted = z;
        std::sort(sorted.begin(), sorted.end(), std::greater<double>());
        std::vector<bool> seen(in.f, false);
        for (int64_t j = 0; j < in.k; ++j) {
            const int32_t f = a.indices[r * in.k + j];
            CHECK(f >= 0 && f < in.f && !seen[f]);
            if (f < 0 || f >= in.f) return;
            seen[f] = true;
            CHECK(z[f] >= sorted[in.k - 1] - slack);
            CHECK(std::fabs(z[f] - a.values[r * in.k + j]) <= slack);
            if (j) CHECK(a.values[r * in.k + j - 1] >= a.values[r * in.k + j]);
        }
    }
}

bool same_bits(const Answer& a, const Answer& b) { return a.values == b.values && a.indices == b.indices; }

}  // namespace

void topk_encode_answers_every_shape_at_every_level() {
    const int64_t shapes[][4] = {{1, 1, 1, 1},     {3, 7, 33, 2},      {17, 31, 64, 5},   {33, 33, 65, 8},
                                 {5, 64, 100, 12}, {40, 100, 1000, 9}, {2, 48, 3000, 24}, {18, 130, 771, 16}};
    for (const auto& s : shapes) {
        const Input in = make(s[0], s[1], s[2], s[3], static_cast<unsigned>(s[2]));
        for (Isa isa : levels()) {
            const Answer one = run(in, isa, 1, false);
            check_answer(in, one, 1e-4);
            CHECK(same_bits(one, run(in, isa, 2, true)));
            CHECK(same_bits(one, run(in, isa, 3, false)));
            if (isa > Isa::kAvx2) CHECK(same_bits(one, run(in, Isa::kAvx2, 1, false)));
            check_answer(in, run(in, isa, 2, true, true), INFINITY);
        }
    }
}

void topk_encode_tells_near_ties_apart_at_every_level() {
    Input in = make(20, 64, 1800, 20, 5);
    for (int64_t f = 0; f < in.f; ++f) {
        for (int64_t i = 0; i < in.d; ++i) {
            float& w = in.weights[f * in.d + i];
            w = f < 1500 ? 0.1f * w : in.x[i] + 1e-5f * w;
        }
        in.bias[f] = 0.0f;
    }
    for (Isa isa : levels()) {
        const Answer a = run(in, isa, 2, true);
        check_answer(in, a, 1e-4);
        if (isa > Isa::kAvx2) CHECK(same_bits(a, run(in, Isa::kAvx2, 1, true)));
    }
}

void topk_encode_computes_overflowing_rows_whole() {
    Input in = make(9, 32, 4000, 8, 6);
    for (int64_t f = 1; f < in.f; ++f) std::copy_n(in.weights.begin(), in.d, in.weights.begin() + f * in.d);
    std::fill(in.bias.begin(), in.bias.end(), 0.0f);
    for (Isa isa : levels()) {
        const Answer a = run(in, isa, 2, true);
        for (int64_t j = 0; j < in.n * in.k; ++j) CHECK(a.indices[j] == j % in.k);
        for (int32_t c : a.candidates) CHECK(c == in.f);
    }
}

void topk_encode_takes_zeros_of_both_signs_for_one_value() {
    Input in = make(3, 16, 400, 40, 9);
    std::fill(in.x.begin(), in.x.end(), 1e-30f);
    std::fill(in.center.begin(), in.center.end(), 0.0f);
    std::fill(in.bias.begin(), in.bias.end(), -0.0f);
    // Products that vanish with their sign; without fma the sum they are added to has lost it.
    for (int64_t f = 0; f < in.f; ++f) std::fill_n(&in.weights[f * in.d], in.d, f % 3 ? 1e-30f : -1e-30f);
    for (Isa isa : levels()) {
        const Answer a = run(in, isa, 2, true);
        for (int64_t j = 0; j < in.n * in.k; ++j) {
            const bool negative = isa >= Isa::kAvx2 && j % in.k % 3 == 0;
            CHECK(a.indices[j] == j % in.k);
            CHECK(a.values[j] == 0 && std::signbit(a.values[j]) == negative);
        }
    }
}

void topk_encode_keeps_few_candidates_on_gaussian_rows() {
    const Input in = make(32, 256, 8192, 32, 7);
    for (Isa isa : levels()) {
        const Answer a = run(in, isa, 2, true);
        const double mean = std::accumulate(a.candidates.begin(), a.candidates.end(), 0.0) / in.n;
        std::printf("  %s: %.1f candidates a row for k = %d\n", isa_name(isa), mean, static_cast<int>(in.k));
        if (isa >= Isa::kAvx2) CHECK(mean < 3 * in.k);
    }
}

void topk_encode_names_what_is_not_finite() {
    for (Isa isa : levels()) {
        Input in = make(20, 16, 300, 4, 8);
        in.x[7 * in.d + 3] = NAN;
        CHECK(run(in, isa, 2, false).bad_row == 7);
        in = make(20, 16, 300, 4, 8);
        in.weights[211 * in.d] = INFINITY;
        CHECK(run(in, isa, 2, false).bad_feature == 211);
        CHECK(run(in, isa, 2, true).bad_feature == 211);
        in = make(20, 16, 300, 4, 8);
        in.bias[5] = NAN;
        CHECK(run(in, isa, 2, false).bad_feature == 5);
    }
}

}  // namespace microtome::test
