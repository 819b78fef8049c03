// coalition_inputs, shapley_reduce and coalition_gram at every level, number by number, in buffers of the exact size.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "cpu/coalition_gram.h"
#include "cpu/coalition_inputs.h"
#include "cpu/shapley_reduce.h"

namespace microtome::test {
namespace {

std::vector<int32_t> whole(int64_t count, int64_t below, unsigned seed) {
    std::mt19937 engine(seed);
    std::vector<int32_t> out(static_cast<size_t>(count));
    for (int32_t& v : out) v = below ? static_cast<int32_t>(engine() % static_cast<unsigned>(below)) : 0;
    return out;
}

std::vector<int32_t> orders(int64_t count, int64_t p, unsigned seed) {
    std::mt19937 engine(seed);
    std::vector<int32_t> out(static_cast<size_t>(count * p));
    for (int64_t i = 0; i < count; ++i) {
        std::iota(out.begin() + i * p, out.begin() + (i + 1) * p, 0);
        std::shuffle(out.begin() + i * p, out.begin() + (i + 1) * p, engine);
    }
    return out;
}

constexpr int64_t kApart = 3;  // items between the rows of x

template <class T>
void check_inputs(int64_t R, int64_t m, int64_t p) {
    const int64_t e = 2, n = 3, q = 4, players = p ? p : m, far = m + kApart;
    const unsigned seed = static_cast<unsigned>(R * 7 + m * 3 + p);
    const auto ranks = orders(q, players, seed);
    auto player = whole(p ? m : 0, p + 1, seed + 1);
    for (int32_t& j : player) --j;
    auto rows = whole(R * 5, 0, 0);
    const auto explicand = whole(R, e, seed + 2), behind = whole(R, n, seed + 3), a = whole(R, players + 1, seed + 4),
               b = whole(R, players + 1, seed + 5);
    for (int64_t r = 0; r < R; ++r) {
        const auto order = static_cast<int32_t>(r * q / R);
        const int32_t row[5] = {explicand[r], behind[r], order, std::min(a[r], b[r]), std::max(a[r], b[r])};
        std::copy(row, row + 5, rows.begin() + r * 5);
    }
    std::vector<T> x(static_cast<size_t>(e * far - kApart)), background(static_cast<size_t>(n * m));
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(i % 100 + 1);
    for (size_t i = 0; i < background.size(); ++i) background[i] = static_cast<T>(101 + i % 100);
    for (const Isa isa : levels()) {
        std::vector<T> out(static_cast<size_t>(R * m));
        const cpu::CoalitionInputs call = {
            x.data(), far, background.data(), m, ranks.data(), rows.data(), p ? player.data() : nullptr, e,
            n,        q,   players,           m, out.data()};
        const auto problem = cpu::coalition_inputs(call, R, sizeof(T), isa_name(isa), 3);
        CHECK(problem.first == 0);
        bool same = true;
        for (int64_t i = 0; i < R * m; ++i) {
            const int32_t* row = rows.data() + i / m * 5;
            const int64_t c = i % m, j = p ? player[c] : c;
            const bool in = j < 0 || (row[3] <= ranks[row[2] * players + j] && ranks[row[2] * players + j] < row[4]);
            same &= out[i] == (in ? x[row[0] * far + c] : background[row[1] * m + c]);
        }
        CHECK(same);
        if (R < 2) continue;
        auto bad = rows;
        bad[(R - 1) * 5 + 4] = static_cast<int32_t>(players + 1);
        const auto found = cpu::coalition_inputs({x.data(), far, background.data(), m, ranks.data(), bad.data(),
                                                  call.player, e, n, q, players, m, out.data()},
                                                 R, sizeof(T), isa_name(isa), 3);
        CHECK(found.first == 4);
        CHECK(found.second == R - 1);
    }
}

template <class T>
void check_reduce(int64_t U, int64_t A, int64_t p, int64_t o, bool paired) {
    const int64_t e = 2, S = 3, L = paired ? 2 * p + 1 : p + 1;
    const auto drawn = whole(e * S * U * A * L * o, 1000, static_cast<unsigned>(U + p + o));
    const std::vector<T> values(drawn.begin(), drawn.end());
    const auto ranks = orders(S * U * A, p, static_cast<unsigned>(p));
    for (const Isa isa : levels()) {
        std::vector<double> mean(static_cast<size_t>(e * S * p * o), -1), m2(mean);
        const int64_t bad = cpu::shapley_reduce(sizeof(T) == 8, address(values), address(ranks), e, S, U, A, p, o,
                                                paired, address(mean), address(m2), isa_name(isa), 3);
        CHECK(bad == -1);
        bool same = true;
        for (int64_t i = 0; i < e * S * p * o; ++i) {
            const int64_t c = i % o, j = i / o % p, s = i / (o * p) % S, explicand = i / (o * p * S);
            std::vector<double> units;
            for (int64_t u = 0; u < U; ++u) {
                double unit = 0;
                for (int64_t order = 0; order < A; ++order) {
                    const int64_t at = (s * U + u) * A + order, r = ranks[at * p + j];
                    const T* v = values.data() + (explicand * S * U * A + at) * L * o + c;
                    double gain = v[(r + 1) * o] - v[r * o];
                    if (paired) gain = (gain + (v[(p + r) * o] - v[(p + r + 1) * o])) * 0.5;
                    unit += gain;
                }
                units.push_back(unit / static_cast<double>(A));
            }
            const double centre = std::accumulate(units.begin(), units.end(), 0.0) / static_cast<double>(U);
            double spread = 0;
            for (const double unit : units) spread += (unit - centre) * (unit - centre);
            same &= mean[i] == centre && m2[i] == spread;
        }
        CHECK(same);
    }
}

void check_gram(int64_t K, int64_t p, int64_t g, int64_t e, int64_t o) {
    const int64_t w = (p + 63) / 64, size = p + 1;
    const unsigned seed = static_cast<unsigned>(K * 5 + p);
    const auto halves = whole(2 * K * w, int64_t{1} << 31, seed), drawn = whole(g * K, 100, seed + 1),
               seen = whole(e * K * o, 100, seed + 2);
    std::vector<uint64_t> coalitions;
    for (int64_t i = 0; i < K * w; ++i) {
        coalitions.push_back(static_cast<uint64_t>(halves[2 * i]) << 33 ^ static_cast<uint64_t>(halves[2 * i + 1])
                                                                              << 1);
    }
    const std::vector<double> weights(drawn.begin(), drawn.end()), values(seen.begin(), seen.end());
    const auto z = [&](int64_t k, int64_t i) {
        return i == 0 ? 1.0 : static_cast<double>(coalitions[k * w + (i - 1) / 64] >> (i - 1) % 64 & 1);
    };
    for (const Isa isa : levels()) {
        std::vector<double> gram(static_cast<size_t>(g * size * size), -1);
        std::vector<double> moments(static_cast<size_t>(e * size * o), -1);
        cpu::coalition_gram(address(coalitions), address(weights), address(values), K, w, g, e, o, p, address(gram),
                            address(moments), isa_name(isa), 3);
        bool same = true;
        for (int64_t i = 0; i < g * size * size; ++i) {
            double sum = 0;
            for (int64_t k = 0; k < K; ++k) {
                sum += weights[i / (size * size) * K + k] * z(k, i / size % size) * z(k, i % size);
            }
            same &= gram[i] == sum;
        }
        CHECK(same);
        same = true;
        for (int64_t i = 0; i < e * size * o; ++i) {
            const int64_t explicand = i / (size * o);
            double sum = 0;
            for (int64_t k = 0; k < K; ++k) {
                sum += weights[(g == 1 ? 0 : explicand) * K + k] * z(k, i / o % size) *
                       values[(explicand * K + k) * o + i % o];
            }
            same &= moments[i] == sum;
        }
        CHECK(same);
    }
}

}  // namespace

void coalition_inputs_are_right_at_every_level() {
    for (const int64_t m : {1, 7, 15, 16, 17, 33, 48, 65, 130}) {
        for (const int64_t p : {0, 5}) {
            check_inputs<uint8_t>(9, m, p);
            check_inputs<uint16_t>(9, m, p);
            check_inputs<uint32_t>(40, m, p);
            check_inputs<uint64_t>(9, m, p);
        }
    }
    check_inputs<uint32_t>(1, 0, 0);
    check_inputs<uint32_t>(5, 5000, 70);
    check_inputs<uint32_t>(7000, 31, 0);
}

void walks_are_reduced_at_every_level() {
    for (const bool paired : {false, true}) {
        for (const int64_t p : {1, 9, 30}) {
            check_reduce<float>(1, 1, p, 1, paired);
            check_reduce<float>(3, 2, p, 1, paired);
            check_reduce<double>(2, 4, p, 5, paired);
        }
        check_reduce<double>(4, 1, 150, 60, paired);
    }
}

void coalitions_are_summed_at_every_level() {
    for (const int64_t p : {1, 8, 31, 32, 33, 64, 65, 100}) {
        check_gram(20, p, 1, 1, 1);
        check_gram(70, p, 2, 2, 9);
    }
    check_gram(0, 5, 1, 2, 1);
    check_gram(9000, 3, 1, 40, 1);
}

}  // namespace microtome::test
