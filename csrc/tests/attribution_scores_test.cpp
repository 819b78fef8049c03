// attribution_scores at every level: against double, and bit for bit between the levels that have fma.
#include "cpu/attribution_scores.h"

#include <cmath>
#include <string>

#include "check.h"

namespace microtome::test {
namespace {

constexpr int64_t kApart = 3;  // elements between the rows of the source

void check_shape(int64_t n, int64_t units, int64_t width) {
    const int64_t w = units * width, far = w + kApart;
    const unsigned seed = static_cast<unsigned>(n * 5 + units * 3 + width);
    auto source = normal(n * far - (n ? kApart : 0), seed);
    const auto base = normal(n * w, seed + 1), grad = normal(n * w, seed + 2);
    for (int64_t c = 0; c < width && n; ++c) source[c] = base[c];  // the first unit does not differ
    std::vector<float> first;
    for (const Isa isa : levels()) {
        std::vector<float> scores(static_cast<size_t>(n * units), NAN);
        std::vector<uint8_t> changed(static_cast<size_t>(n * units), 9);
        cpu::attribution_scores(false, address(source), far, address(base), w, address(grad), w, address(scores),
                                address(changed), n, units, width, isa_name(isa), 3);
        for (int64_t e = 0; e < n * units; ++e) {
            const int64_t row = e / units, from = e % units * width;
            double exact = 0, size = 0;
            for (int64_t c = from; c < from + width; ++c) {
                const double product = (double(source[row * far + c]) - base[row * w + c]) * grad[row * w + c];
                exact += product;
                size += std::fabs(product);
            }
            CHECK(std::fabs(scores[e] - exact) <= 1e-6 * size);
            CHECK(changed[e] == (e > 0));
        }
        if (isa == Isa::kGeneric) continue;
        if (first.empty()) first = scores;
        CHECK(scores == first);
    }
}

}  // namespace

void attribution_scores_are_right_at_every_level() {
    for (const int64_t n : {0, 1, 5, 700}) {
        for (const int64_t width : {1, 2, 15, 16, 37}) {
            check_shape(n, 1, width);
            check_shape(n, 19, width);
        }
    }
}

}  // namespace microtome::test
