// mlp_shapley at every level: against double, in buffers of exact size.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "check.h"
#include "cpu/mlp_shapley_kernel.h"

namespace microtome::test {
namespace {

struct Network {
    int64_t e, n, m, S, U, A, p;
    std::vector<int64_t> widths;  // of x and of each layer's outputs
    std::vector<std::vector<float>> W, b;
    std::vector<int> codes;
    std::vector<float> x, background;
    std::vector<int32_t> ranks, player;
    bool paired;
};

Network make(int64_t e, int64_t n, int64_t m, int64_t S, int64_t U, int64_t A, int64_t p, std::vector<int64_t> widths,
             bool paired) {
    Network g{e, n, m, S, U, A, p, {m}, {}, {}, {}, normal(e * m, 1), normal(n * m, 2), {}, {}, paired};
    std::mt19937 engine(3);
    for (int64_t order = 0; order < S * U * A; ++order) {
        std::vector<int32_t> places(static_cast<size_t>(p));
        std::iota(places.begin(), places.end(), 0);
        std::shuffle(places.begin(), places.end(), engine);
        g.ranks.insert(g.ranks.end(), places.begin(), places.end());
    }
    for (int64_t c = 0; c < m && p != m; ++c) g.player.push_back(static_cast<int32_t>(c % (p + 1) - 1));
    for (int64_t o : widths) {
        const int64_t i = g.widths.back();
        g.W.push_back(normal(o * i, static_cast<unsigned>(10 + o)));
        for (float& w : g.W.back()) w /= std::sqrt(static_cast<float>(i));
        g.b.push_back(normal(o, static_cast<unsigned>(20 + o)));
        g.codes.push_back(g.codes.size() % 2 ? kSigmoid : kRelu);
        g.widths.push_back(o);
    }
    return g;
}

std::vector<double> value(const Network& g, int64_t e, int64_t b, const std::vector<bool>& present) {
    std::vector<double> a;
    for (int64_t c = 0; c < g.m; ++c) {
        const int64_t player = g.player.empty() ? c : g.player[c];
        const bool here = player < 0 || present[player];
        a.push_back(here ? g.x[e * g.m + c] : g.background[b * g.m + c]);
    }
    for (size_t l = 0; l < g.W.size(); ++l) {
        std::vector<double> h(g.b[l].begin(), g.b[l].end());
        for (size_t j = 0; j < h.size(); ++j) {
            for (size_t c = 0; c < a.size(); ++c) h[j] += a[c] * g.W[l][j * a.size() + c];
            h[j] = g.codes[l] == kRelu ? std::max(h[j], 0.0) : 1 / (1 + std::exp(-h[j]));
        }
        a = h;
    }
    return a;
}

// [e, S, p, o], set by set.
std::vector<double> means(const Network& g) {
    const int64_t o = g.widths.back();
    std::vector<double> out(g.e * g.S * g.p * o);
    for (int64_t at = 0; at < g.e * g.S * g.U * g.A; ++at) {
        const int64_t e = at / (g.S * g.U * g.A), s = at / (g.U * g.A) % g.S;
        const int32_t* rank = g.ranks.data() + at % (g.S * g.U * g.A) * g.p;
        const int64_t first = g.S == 1 ? 0 : s, last = g.S == 1 ? g.n : s + 1;
        for (int64_t b = first; b < last; ++b) {
            for (int64_t j = 0; j < g.p; ++j) {
                for (int way = 0; way < (g.paired ? 2 : 1); ++way) {
                    std::vector<bool> with(g.p), without(g.p);
                    for (int64_t q = 0; q < g.p; ++q) {
                        without[q] = way ? rank[q] > rank[j] : rank[q] < rank[j];
                        with[q] = without[q] || q == j;
                    }
                    const std::vector<double> more = value(g, e, b, with), less = value(g, e, b, without);
                    const double share = 1.0 / (g.U * g.A * (last - first) * (g.paired ? 2 : 1));
                    for (int64_t q = 0; q < o; ++q)
                        out[((e * g.S + s) * g.p + j) * o + q] += share * (more[q] - less[q]);
                }
            }
        }
    }
    return out;
}

struct Answer {
    std::vector<double> mean, m2;
    int64_t bad;
};

Answer run(const Network& g, Isa isa, bool half, int threads) {
    const auto size = static_cast<size_t>(g.e * g.S * g.p * g.widths.back());
    Answer out{std::vector<double>(size, NAN), std::vector<double>(size, NAN), 0};
    cpu::MlpShapleyArguments a{g.x.data(),
                               g.background.data(),
                               g.ranks.data(),
                               g.e,
                               g.n,
                               g.m,
                               g.S,
                               g.U,
                               g.A,
                               g.p,
                               {},
                               {},
                               g.codes,
                               g.player.empty() ? nullptr : g.player.data(),
                               g.paired,
                               half,
                               out.mean.data(),
                               out.m2.data()};
    for (size_t l = 0; l < g.W.size(); ++l) {
        a.weights.push_back({address(g.W[l]), g.widths[l + 1], g.widths[l], g.widths[l], 1});
        a.biases.push_back(address(g.b[l]));
    }
    out.bad = cpu::mlp_shapley(a, isa_name(isa), threads);
    return out;
}

}  // namespace

void walks_through_a_network_are_right_at_every_level() {
    const Network games[] = {
        make(2, 3, 5, 3, 2, 2, 5, {40, 33, 2}, true),     make(1, 9, 7, 1, 2, 1, 3, {65, 130, 7, 1}, true),
        make(1, 2, 3, 2, 1, 1, 1, {17, 5}, false),        make(2, 1, 4, 1, 3, 1, 4, {3}, true),
        make(1, 1, 35, 1, 1, 1, 35, {300, 31, 1}, false), make(0, 2, 3, 2, 1, 1, 3, {4, 4, 4}, true),
    };
    for (const Network& g : games) {
        const std::vector<double> exact = means(g);
        for (Isa isa : levels()) {
            for (bool half : {false, true}) {
                const Answer one = run(g, isa, half, 1), three = run(g, isa, half, 3);
                CHECK(one.bad == -1 && one.mean == three.mean && one.m2 == three.m2);
                for (size_t i = 0; i < exact.size(); ++i) {
                    CHECK(std::fabs(one.mean[i] - exact[i]) < (half ? 1e-2 : 2e-6) && one.m2[i] >= 0);
                }
            }
        }
    }
}

void an_order_that_is_no_permutation_leaves_the_output_alone() {
    Network g = make(1, 2, 4, 2, 2, 1, 4, {8, 8, 1}, true);
    for (int32_t bad : {-1, 4, g.ranks[8]}) {
        Network wrong = g;
        wrong.ranks[2 * 4 + 1] = bad;
        const Answer answer = run(wrong, Isa::kGeneric, false, 2);
        CHECK(answer.bad == 2);
        for (double v : answer.mean) CHECK(std::isnan(v));
    }
}

void what_a_relu_leaves_zero_may_be_left_out_of_a_product() {
    constexpr int64_t kRows = kTileRows, kInputs = 600;  // more than two blocks of sums
    std::vector<float> rows = normal(kRows * 608, 5), W = normal(kInputs * kPanelLanes, 6);
    std::vector<uint16_t> seen(608 / 16);
    for (int64_t line = 0; line < 608 / 16; ++line) {
        for (int64_t i = 0; i < 16; ++i) {
            const bool dead = line * 16 + i >= kInputs || (line * 7 + i) % 3 == 0 || line == 20;
            for (int64_t r = 0; r < kRows && dead; ++r) rows[(line * kRows + r) * 16 + i] = 0;
            if (!dead) seen[line] = static_cast<uint16_t>(seen[line] | 1u << i);
        }
    }
    std::vector<int32_t> list(608 + 16);
    const int64_t count = list_bits(seen.data(), 608 / 16, list.data());
    std::vector<float> whole(kRows * kPanelLanes), some(kRows * kPanelLanes);
    const auto *lines = reinterpret_cast<const char*>(rows.data()), *panel = reinterpret_cast<const char*>(W.data());
    Ahead nothing = {panel, 0};
    cpu::Float32::multiply(kRows, lines, panel, kInputs, nothing, whole.data());
    multiply_listed<FloatPanel>(kRows, lines, panel, list.data(), count, some.data(), StoreSums{some.data()});
    CHECK(count < kInputs && whole == some);
}

}  // namespace microtome::test
