// The CUDA kernels on the emulator, in buffers of the exact size; the numbers are tested from Python.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "cuda/coalition_inputs.h"
#include "cuda/random_ranks.h"
#include "cuda/sae_update.h"
#include "cuda/shapley_reduce.h"
#include "cuda/topk_select.h"
#include "emulator/simt.h"

namespace microtome::test {
namespace {

std::vector<int32_t> below(int64_t count, int64_t limit, unsigned seed) {
    std::mt19937 engine(seed);
    std::vector<int32_t> out(static_cast<size_t>(count));
    for (int32_t& v : out) v = static_cast<int32_t>(engine() % static_cast<unsigned>(limit));
    return out;
}

// `run` gives a vector; it must be the same under every order of threads and blocks.
template <class Run>
auto in_every_order(Run run) {
    simt::set_order(simt::Order::kForward, 0);
    const auto expected = run();
    for (simt::Order order : {simt::Order::kReverse, simt::Order::kShuffled}) {
        simt::set_order(order, 17);
        CHECK(run() == expected);
    }
    simt::set_order(simt::Order::kForward, 0);
    return expected;
}

}  // namespace

void cuda_orders_are_permutations() {
    for (int64_t p : {1, 3, 33, 70}) {
        const int64_t n = 5;
        const std::vector<int64_t> samples{0, 1, 2, 1 << 20, 9};
        const auto ranks = in_every_order([&] {
            std::vector<int32_t> out(static_cast<size_t>(n * p), -1);
            cuda::random_ranks(address(samples), address(out), n, p, 42, 0);
            return out;
        });
        for (int64_t i = 0; i < n; ++i) {
            std::vector<int32_t> row(ranks.begin() + i * p, ranks.begin() + (i + 1) * p);
            std::sort(row.begin(), row.end());
            for (int64_t j = 0; j < p; ++j) CHECK(row[static_cast<size_t>(j)] == j);
        }
    }
}

void cuda_candidates_are_valued_and_selected() {
    const int64_t n = 3, f = 90;
    for (int64_t d : {5, 8}) {
        for (int64_t k : {2, 9}) {
            const int64_t capacity = 50;
            const auto x = normal(n * d, 1), W = normal(f * d, 2), bias = normal(f, 3), center = normal(d, 4);
            const std::vector<int32_t> count{50, 7, 0};
            std::vector<int32_t> index(static_cast<size_t>(n * capacity));
            for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int32_t>(i * 7 % f);
            const std::vector<float> theta(static_cast<size_t>(n), -1e30f);
            in_every_order([&] {
                std::vector<float> value(static_cast<size_t>(n * capacity), 0.0f), best(static_cast<size_t>(n * k));
                std::vector<int32_t> chosen(best.size()), candidates(static_cast<size_t>(n)), failed(candidates),
                    failures{0};
                auto features = index;
                cuda::candidate_values(false, address(x), address(W), address(bias), address(center), address(count),
                                       address(features), address(value), n, d, capacity, false, 0);
                cuda::select_candidates(false, address(theta), address(count), address(features), address(value),
                                        address(failed), address(failures), address(best), address(chosen),
                                        address(candidates), n, k, f, capacity, false, 0);
                CHECK(std::is_sorted(best.begin(), best.begin() + k, std::greater<float>()));
                CHECK(failures[0] == (k > 7 ? 2 : 1) && candidates[0] == 50);
                return std::make_pair(best, chosen);
            });
        }
    }
}

void cuda_coalitions_are_written() {
    for (int64_t m : {5, 8, 64}) {
        const int64_t e = 2, b = 3, q = 4, R = 35;
        const auto x = below(e * m, 1000, 1), background = below(b * m, 1000, 2), ranks = below(q * m, m, 3);
        std::vector<int32_t> rows;
        for (int64_t r = 0; r < R; ++r) {
            for (int64_t v : {r % e, r % b, r / 3 % q, r % 3, m - r % 2}) rows.push_back(static_cast<int32_t>(v));
        }
        const auto out = in_every_order([&] {
            std::vector<int32_t> made(static_cast<size_t>(R * m), -1);
            cuda::coalition_inputs(4, address(x), address(background), address(ranks), address(rows), 0, m, m, R,
                                   address(made), 0);
            return made;
        });
        for (int64_t r = 0; r < R; ++r) {
            const int32_t* const row = rows.data() + 5 * r;
            for (int64_t c = 0; c < m; ++c) {
                const int32_t rank = ranks[static_cast<size_t>(row[2] * m + c)];
                const auto& from = rank >= row[3] && rank < row[4] ? x : background;
                const int64_t at = (rank >= row[3] && rank < row[4] ? row[0] : row[1]) * m + c;
                CHECK(out[static_cast<size_t>(r * m + c)] == from[static_cast<size_t>(at)]);
            }
        }
    }
}

void cuda_walks_are_reduced() {
    for (int64_t U : {3, 140}) {
        for (int64_t p : {4, 30}) {
            const int64_t e = 2, S = 2, A = 1, o = 2, points = 2 * p + 1, parts = (U + cuda::kUnits - 1) / cuda::kUnits;
            const auto values = normal(e * S * U * A * points * o, 5);
            const auto ranks = below(S * U * A * p, p, 6);
            const auto mean = in_every_order([&] {
                std::vector<double> out(static_cast<size_t>(e * S * p * o)), m2(out);
                std::vector<double> room(parts > 1 ? 2 * static_cast<size_t>(parts) * out.size() : 0);
                cuda::shapley_reduce(false, address(values), address(ranks), e, S, U, A, p, o, true, address(out),
                                     address(m2), address(room), 0);
                return out;
            });
            for (double v : mean) CHECK(std::abs(v) < 10.0);
        }
    }
}

void cuda_steps_move_every_parameter() {
    for (int64_t d : {6, 8, 36}) {
        const int64_t n = 150, f = 7, k = 2, m = n * k, stride = 96;
        auto latents = below(m, f, 7);
        for (int64_t i = 0; i < n; ++i) latents[static_cast<size_t>(i)] = 3;  // fires on every row
        std::sort(latents.begin(), latents.end());
        std::vector<int64_t> order(static_cast<size_t>(m));
        for (int64_t i = 0; i < m; ++i) order[static_cast<size_t>(i)] = i * 7 % m;
        const auto values = normal(m, 8), slopes = normal(m, 9), grad_out = normal(n * d, 10), x = normal(n * d, 11);
        const auto before = normal(f * d, 12);
        in_every_order([&] {
            auto W_enc = before, W_dec = before, b_enc = normal(f, 13), b_dec = normal(d, 14);
            std::vector<float> states[8], weight(values), slope(values), bias(static_cast<size_t>(f)),
                stats(static_cast<size_t>(4 * f));
            for (int i = 0; i < 8; ++i) states[i].resize(i < 4 ? W_enc.size() : i < 6 ? b_enc.size() : b_dec.size());
            std::vector<float> dec(static_cast<size_t>((m + 127) / 128 * d)), enc(dec);
            std::vector<float> centre(static_cast<size_t>(cuda::update_programs(f) * d));
            std::vector<int32_t> source(latents), offsets(static_cast<size_t>(f + 1)), fired(static_cast<size_t>(f)),
                touched(fired);
            std::vector<uint8_t> flags(static_cast<size_t>(m));
            std::vector<uint16_t> shadow(static_cast<size_t>(f * stride)), copy(static_cast<size_t>(f * d));
            const cuda::Code code{address(values), address(slopes), address(grad_out), k, 0.5f};
            const cuda::Entries e{address(latents),
                                  address(order),
                                  address(weight),
                                  address(slope),
                                  address(source),
                                  address(flags),
                                  address(offsets),
                                  address(bias),
                                  address(fired),
                                  address(touched),
                                  address(dec),
                                  address(enc),
                                  m,
                                  n,
                                  d,
                                  f,
                                  false};
            const cuda::Rule rule{true, false, true, 0.01f, 0.9f, 0.1f, 0.999f, 0.001f, 1e-8f, 0.0f, 1.0f, 1.0f};
            const cuda::Update update{{address(W_enc), address(states[0]), address(states[1])},
                                      {address(b_enc), address(states[4]), address(states[5])},
                                      {address(W_dec), address(states[2]), address(states[3])},
                                      {address(b_dec), address(states[6]), address(states[7])},
                                      address(shadow),
                                      address(stats),
                                      stride,
                                      address(copy),
                                      0,
                                      address(centre),
                                      0,
                                      false,
                                      true,
                                      true};
            cuda::sort_entries(e, code, code, address(x), 0);
            cuda::sae_update(e, code, code, address(x), rule, update, 0);
            CHECK(offsets[static_cast<size_t>(f)] == m);
            for (size_t i = 0; i < W_enc.size(); ++i) {
                CHECK(W_enc[i] != before[i] && std::isfinite(W_dec[i]));
                const auto at = static_cast<int64_t>(i);
                CHECK(copy[i] == shadow[static_cast<size_t>(at / d * stride + at % d)]);
            }
            return std::make_pair(W_enc, std::make_pair(W_dec, b_dec));
        });
    }
}

}  // namespace microtome::test
