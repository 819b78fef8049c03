// pack_weights, packed_linear and delta_linear at every level: against double, in buffers of exact size.
#include <cmath>
#include <cstring>
#include <string>

#include "check.h"
#include "common/dtype.h"
#include "cpu/delta_linear.h"
#include "cpu/pack_weights.h"
#include "cpu/packed_linear.h"

namespace microtome::test {
namespace {

constexpr int64_t kBases = 3, kGap = 5;  // base rows; elements between two rows

struct Layer {
    int64_t T, i, o;
    std::vector<float> x, W, bias, add, x_base, y_base;  // rows of x, add, x_base, y_base lie kGap apart
    std::vector<int32_t> index;
};

// Without the last gap, so a read past the last row is seen.
std::vector<float> rows(int64_t count, int64_t width, unsigned seed) {
    return normal(count ? count * (width + kGap) - kGap : 0, seed);
}

Layer make(int64_t T, int64_t i, int64_t o) {
    const unsigned seed = static_cast<unsigned>(T * 11 + i * 7 + o);
    Layer l{T,
            i,
            o,
            rows(T, i, seed),
            normal(o * i, seed + 1),
            normal(o, seed + 2),
            rows(T, o, seed + 3),
            rows(kBases, i, seed + 4),
            rows(kBases, o, seed + 5),
            {}};
    for (int64_t t = 0; t < T; ++t) l.index.push_back(static_cast<int32_t>(t * 7 % kBases));
    return l;
}

double rounded(float a) {  // to bfloat16, nearest even; for finite numbers
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&a, &bits, sizeof bits);
    return a;
}

std::vector<float> pack(const Layer& l) {
    std::vector<float> packed((l.o + 31) / 32 * l.i * 32, NAN);
    cpu::pack_weights(address(l.W), l.o, l.i, l.i, 1, false, address(packed), 2);
    return packed;
}

std::vector<bf16> pack_half(const Layer& l) {
    std::vector<bf16> packed((l.o + 31) / 32 * ((l.i + 31) / 32 * 32) * 32, bf16{0x7fc0});
    cpu::pack_weights(address(l.W), l.o, l.i, l.i, 1, true, address(packed), 2);
    return packed;
}

std::vector<float> linear(const Layer& l, Isa isa, int threads) {
    const std::vector<float> packed = pack(l);
    std::vector<float> y(l.T * l.o, NAN);
    cpu::packed_linear(address(l.x), l.i + kGap, address(packed), address(l.bias), address(l.add), l.o + kGap,
                       address(y), l.T, l.i, l.o, isa_name(isa), threads);
    return y;
}

std::vector<float> delta(const Layer& l, Isa isa, int threads, int64_t bases = kBases) {
    const std::vector<bf16> packed = pack_half(l);
    std::vector<float> y(l.T * l.o, NAN);
    const int64_t bad = cpu::delta_linear(address(l.x), l.i + kGap, address(l.x_base), l.i + kGap, address(l.y_base),
                                          l.o + kGap, address(l.index), address(packed), address(l.add), l.o + kGap,
                                          address(y), l.T, bases, l.i, l.o, isa_name(isa), threads);
    CHECK(bad == (bases < kBases && l.T > 2 ? 2 : -1));
    return y;
}

void check(const Layer& l, const std::vector<float>& whole, const std::vector<float>& difference) {
    for (int64_t t = 0; t < l.T; ++t) {
        const int64_t base = l.index[t];
        for (int64_t j = 0; j < l.o; ++j) {
            const double added = l.add[t * (l.o + kGap) + j];
            double plain = l.bias[j] + added, delta = l.y_base[base * (l.o + kGap) + j] + added, size = 1;
            for (int64_t c = 0; c < l.i; ++c) {
                const float x = l.x[t * (l.i + kGap) + c], w = l.W[j * l.i + c];
                plain += static_cast<double>(x) * w;
                delta += rounded(x - l.x_base[base * (l.i + kGap) + c]) * rounded(w);
                size += std::fabs(static_cast<double>(x) * w);
            }
            CHECK(std::fabs(plain - whole[t * l.o + j]) < 1e-5 * size);
            CHECK(std::fabs(delta - difference[t * l.o + j]) < 1e-5 * size);
        }
    }
}

}  // namespace

void products_with_panels_are_right_at_every_level() {
    const int64_t shapes[][3] = {{1, 1, 1},   {2, 31, 32},   {6, 32, 33},    {14, 33, 70},
                                 {17, 64, 5}, {45, 300, 40}, {70, 130, 100}, {0, 5, 5}};
    for (const auto& s : shapes) {
        const Layer l = make(s[0], s[1], s[2]);
        for (Isa isa : levels()) {
            const std::vector<float> whole = linear(l, isa, 1), difference = delta(l, isa, 1);
            check(l, whole, difference);
            CHECK(whole == linear(l, isa, 3) && difference == delta(l, isa, 3));
            if (isa > Isa::kAvx2) CHECK(whole == linear(l, Isa::kAvx2, 2));
        }
    }
}

void a_base_row_that_is_not_there_leaves_the_output_alone() {
    const Layer l = make(5, 9, 40);
    for (Isa isa : levels()) {
        for (float y : delta(l, isa, 2, kBases - 1)) CHECK(std::isnan(y));
    }
}

}  // namespace microtome::test
