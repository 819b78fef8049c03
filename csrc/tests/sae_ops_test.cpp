// sparse_decode, sae_loss, sae_update and screen_weights at every level: against double, and bit for bit between the
// levels that have fma.
#include <cmath>
#include <string>

#include "check.h"
#include "cpu/sae_loss.h"
#include "cpu/sae_update.h"
#include "cpu/screen_weights.h"
#include "cpu/sparse_decode.h"

namespace microtome::test {
namespace {

struct Problem {
    int64_t n, k, d, f;
    std::vector<float> x, values, W, b;
    std::vector<int32_t> indices;
};

Problem make(int64_t n, int64_t k, int64_t d, int64_t f) {
    const unsigned seed = static_cast<unsigned>(n * 7 + k * 5 + d * 3 + f);
    Problem p{n, k, d, f, normal(n * d, seed), normal(n * k, seed + 1), normal(f * d, seed + 2), normal(d, seed + 3),
              {}};
    for (int64_t e = 0; e < n * k; ++e) {
        p.indices.push_back(static_cast<int32_t>(e % k ? (e * 7919) % f : 0));  // feature 0 fires on every row
        if (p.values[e] < 0) p.values[e] = 0;
    }
    return p;
}

struct Outputs {
    std::vector<float> decoded, grad_values, grad_W, sse, grad_out, loss_grad_values;
    bool operator==(const Outputs& o) const {
        return decoded == o.decoded && grad_values == o.grad_values && grad_W == o.grad_W && sse == o.sse &&
               grad_out == o.grad_out && loss_grad_values == o.loss_grad_values;
    }
};

Outputs run(const Problem& p, Isa isa, int threads) {
    const std::string name = isa_name(isa);
    Outputs o;
    for (auto* v : {&o.decoded, &o.grad_out}) v->assign(p.n * p.d, NAN);
    for (auto* v : {&o.grad_values, &o.loss_grad_values}) v->assign(p.n * p.k, NAN);
    o.grad_W.assign(p.f * p.d, NAN);
    o.sse.assign(p.n, NAN);
    const uintptr_t values = address(p.values), indices = address(p.indices), W = address(p.W);
    cpu::sparse_decode(false, values, indices, W, address(p.b), address(o.decoded), p.n, p.k, p.d, p.f, name, threads);
    cpu::sparse_decode_grad_values(false, address(p.x), indices, W, address(o.grad_values), p.n, p.k, p.d, p.f, name,
                                   threads);
    cpu::sparse_decode_grad_W_dec(false, values, indices, address(p.x), address(o.grad_W), p.n, p.k, p.d, p.f, name,
                                  threads);
    cpu::sae_loss(false, address(p.x), values, indices, W, address(p.b), address(o.sse), address(o.grad_out),
                  address(o.loss_grad_values), p.n, p.k, p.d, p.f, name, threads);
    return o;
}

void check_outputs(const Problem& p, const Outputs& o) {
    std::vector<double> grad_W(p.f * p.d, 0.0);
    for (int64_t r = 0; r < p.n; ++r) {
        double sse = 0;
        std::vector<double> e(p.d);
        for (int64_t i = 0; i < p.d; ++i) {
            double out = p.b[i];
            for (int64_t j = r * p.k; j < (r + 1) * p.k; ++j) {
                out += static_cast<double>(p.values[j]) * p.W[p.indices[j] * p.d + i];
                grad_W[p.indices[j] * p.d + i] += static_cast<double>(p.values[j]) * p.x[r * p.d + i];
            }
            CHECK(std::fabs(out - o.decoded[r * p.d + i]) < 1e-4);
            e[i] = out - p.x[r * p.d + i];
            CHECK(std::fabs(2 * e[i] - o.grad_out[r * p.d + i]) < 1e-4);
            sse += e[i] * e[i];
        }
        CHECK(std::fabs(sse - o.sse[r]) < 1e-4 * (1 + sse));
        for (int64_t j = r * p.k; j < (r + 1) * p.k; ++j) {
            double with_x = 0, with_e = 0;
            for (int64_t i = 0; i < p.d; ++i) {
                with_x += static_cast<double>(p.x[r * p.d + i]) * p.W[p.indices[j] * p.d + i];
                with_e += 2 * e[i] * p.W[p.indices[j] * p.d + i];
            }
            CHECK(std::fabs(with_x - o.grad_values[j]) < 1e-3);
            CHECK(std::fabs((p.values[j] != 0 ? with_e : 0.0) - o.loss_grad_values[j]) < 1e-2);
        }
    }
    for (int64_t i = 0; i < p.f * p.d; ++i) CHECK(std::fabs(grad_W[i] - o.grad_W[i]) < 1e-3);
}

struct Trained {
    std::vector<float> W_enc, b_enc, W_dec, b_dec, stats;
    std::vector<int16_t> shadow;
    std::vector<int32_t> fired;
    std::vector<uint16_t> copies[2];  // of W_enc and W_dec
    bool operator==(const Trained& o) const {
        return W_enc == o.W_enc && b_enc == o.b_enc && W_dec == o.W_dec && b_dec == o.b_dec && stats == o.stats &&
               shadow == o.shadow && fired == o.fired && copies[0] == o.copies[0] && copies[1] == o.copies[1];
    }
};

Trained update(const Problem& p, Isa isa, int threads, const char* optimizer, int kind) {
    const int64_t stride = 32 * (((p.d + 31) / 32) | 1);
    const Outputs o = run(p, Isa::kGeneric, 1);
    Trained t{normal(p.f * p.d, 91),
              normal(p.f, 92),
              normal(p.f * p.d, 93),
              normal(p.d, 94),
              std::vector<float>(p.f * 4, NAN),
              std::vector<int16_t>(p.f * stride, -1),
              std::vector<int32_t>(p.f, -1),
              {std::vector<uint16_t>(p.f * p.d), std::vector<uint16_t>(p.f * p.d)}};
    const bool adam = optimizer[0] == 'a';
    std::vector<std::vector<float>> moments;
    for (int64_t size : {p.f * p.d, p.f, p.f * p.d, p.d}) {
        moments.emplace_back(size, 0.0f);
        moments.emplace_back(adam ? size : 0, 0.0f);
    }
    uintptr_t m[8];
    for (int i = 0; i < 8; ++i) m[i] = address(moments[i]);
    for (int step = 1; step <= 3; ++step) {
        const int64_t bad = cpu::sae_update(
            p.n, p.d, p.f, p.k, address(p.indices), 4, address(p.values), address(o.loss_grad_values),
            address(o.grad_out), 0.01, 0, 0, 4, 0, 0, 0, 0.0, address(p.x), address(t.W_enc), address(t.b_enc),
            address(t.W_dec), address(t.b_dec), m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7], kind, stride,
            address(t.shadow), address(t.stats), address(t.copies[0]), address(t.copies[1]), 0, 0, 0, 0, optimizer,
            1e-3, 0.9, 0.999, 1e-8, 0.01, step, false, true, true, true, address(t.fired), isa_name(isa), threads);
        CHECK(bad == -1);
    }
    std::vector<int16_t> shadow(t.shadow.size());
    std::vector<float> stats(t.stats.size());
    CHECK(cpu::screen_weights(address(t.W_enc), p.f, p.d, stride, kind, address(shadow), address(stats), isa_name(isa),
                              threads));
    CHECK(shadow == t.shadow && stats == t.stats);
    return t;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
    double most = 0;
    for (size_t i = 0; i < a.size(); ++i) most = std::fmax(most, std::fabs(static_cast<double>(a[i]) - b[i]));
    return most;
}

}  // namespace

void decode_and_loss_are_right_at_every_level() {
    const int64_t shapes[][4] = {{1, 1, 1, 1}, {3, 2, 7, 5}, {17, 5, 33, 40}, {600, 4, 20, 50}, {9, 12, 130, 300}};
    for (const auto& s : shapes) {
        const Problem p = make(s[0], s[1], s[2], s[3]);
        for (Isa isa : levels()) {
            const Outputs one = run(p, isa, 1);
            check_outputs(p, one);
            CHECK(one == run(p, isa, 3));
            if (isa > Isa::kAvx2) CHECK(one == run(p, Isa::kAvx2, 2));
        }
    }
}

void the_update_agrees_between_levels_and_threads() {
    const int64_t shapes[][4] = {{3, 2, 7, 5}, {17, 5, 33, 40}, {600, 4, 20, 50}, {9, 12, 130, 300}};
    for (const auto& s : shapes) {
        const Problem p = make(s[0], s[1], s[2], s[3]);
        for (const char* optimizer : {"adam", "adamw", "sgd", "signsgd"}) {
            for (int kind : {0, 1}) {
                const Trained plain = update(p, Isa::kGeneric, 1, optimizer, kind);
                for (Isa isa : levels()) {
                    const Trained one = update(p, isa, 1, optimizer, kind);
                    CHECK(one == update(p, isa, 3, optimizer, kind));
                    // A sign can flip where the momentum is all rounding: each flip moves a weight by two steps.
                    CHECK(distance(one.W_enc, plain.W_enc) < 7e-3 && distance(one.W_dec, plain.W_dec) < 7e-3);
                    CHECK(one.fired == plain.fired);
                    if (isa > Isa::kAvx2) CHECK(one == update(p, Isa::kAvx2, 2, optimizer, kind));
                }
            }
        }
    }
}

void the_screen_bounds_its_error_at_every_level() {
    for (int64_t d : {1, 15, 33, 200, 1000}) {
        const int64_t f = 40, stride = 32 * (((d + 31) / 32) | 1);
        std::vector<float> W = normal(f * d, static_cast<unsigned>(d));
        for (int64_t i = 0; i < d; ++i) W[i] = 0, W[d + i] *= 1e-30f, W[2 * d + i] *= 1e18f, W[3 * d] = 1e4f;
        for (Isa isa : levels()) {
            for (int kind : {0, 1}) {
                std::vector<int16_t> shadow(f * stride, -1);
                std::vector<float> stats(f * 4, NAN);
                CHECK(cpu::screen_weights(address(W), f, d, stride, kind, address(shadow), address(stats),
                                          isa_name(isa), 2));
                for (int64_t r = 0; r < f; ++r) {
                    double norm = 0, error = 0, codes = 0;
                    for (int64_t i = 0; i < stride; ++i) {
                        const int16_t q = shadow[r * stride + i];
                        if (i >= d) {
                            CHECK(q == 0);
                            continue;
                        }
                        const double w = W[r * d + i];
                        const uint32_t bits = static_cast<uint32_t>(static_cast<uint16_t>(q)) << 16;
                        float half;
                        static_assert(sizeof half == sizeof bits, "");
                        __builtin_memcpy(&half, &bits, sizeof half);
                        const double copy = kind == 0 ? half : static_cast<double>(q) * stats[r * 4];
                        norm += w * w;
                        error += (w - copy) * (w - copy);
                        codes += static_cast<double>(q) * q;
                    }
                    CHECK(std::sqrt(norm) <= stats[r * 4 + 1]);
                    CHECK(std::sqrt(error) <= stats[r * 4 + 2]);
                    if (kind == 1) CHECK(std::sqrt(codes) <= 46340.0);
                }
            }
        }
    }
}

}  // namespace microtome::test
