// csrc/emulator/amx.h: the numbers of its product, and what it refuses.
#include "emulator/amx.h"

#if defined(MICROTOME_X86)

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#include "check.h"

namespace microtome::test {
namespace {

using namespace emulated;

struct Config {
    unsigned char bytes[64]{};
    Config& tile(int t, int rows, int row_bytes) {
        bytes[0] = 1;
        bytes[16 + 2 * t] = static_cast<unsigned char>(row_bytes);
        bytes[48 + t] = static_cast<unsigned char>(rows);
        return *this;
    }
};

// Tile 0 [m, n] of sums, 1 [m, 2 k] and 2 [k, 2 n] of pairs.
Config shapes(int m, int k, int n) {
    Config config;
    return config.tile(0, m, 4 * n).tile(1, m, 4 * k).tile(2, k, 4 * n);
}

std::string refusal(const std::function<void()>& of) {
    std::string what;
    try {
        of();
    } catch (const std::runtime_error& error) {
        what = error.what();
    }
    tile_release();
    return what;
}

uint16_t bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
}

float widened(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

constexpr float kSmallest = std::numeric_limits<float>::min();  // normal number

float flushed(float x) { return std::fabs(x) < kSmallest ? std::copysign(0.0f, x) : x; }

// One sum of the manual's operation, the slow way: a [pairs][2] against b [pairs][2].
float sum_of(float sum, const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
    float part[2] = {0, 0};
    for (size_t i = 0; i < a.size(); ++i) {
        part[i % 2] = flushed(std::fma(flushed(widened(a[i])), flushed(widened(b[i])), part[i % 2]));
    }
    return flushed(flushed(sum) + flushed(part[0] + part[1]));
}

// The unit's answer to the same: the one row of tile 1 and the one column of tile 2.
float sum_by_tiles(float sum, const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
    const int pairs = static_cast<int>(a.size() / 2);
    tile_loadconfig(shapes(1, pairs, 1).bytes);
    tile_loadd(0, &sum, 4);
    tile_loadd(1, a.data(), 4 * pairs);
    tile_loadd(2, b.data(), 4);
    tile_dpbf16ps(0, 1, 2);
    tile_stored(0, &sum, 4);
    tile_release();
    return sum;
}

std::vector<uint16_t> halves(const std::vector<float>& x) {
    std::vector<uint16_t> out;
    for (float v : x) out.push_back(bf16(v));
    return out;
}

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

void tiles_round_and_flush_as_the_manual_says() {
    if (highest_isa() < Isa::kAmx) return;
    const float big = 16777216, tiny = std::numeric_limits<float>::denorm_min();
    // 2^24 + 1 is lost where ones meet it one by one, and kept where they are first added up: members of pairs apart,
    // and the tile's own sum before it meets what was there.
    CHECK(sum_by_tiles(0, halves({big, 0, 1, 0, 1, 0}), halves({1, 1, 1, 1, 1, 1})) == big);
    CHECK(sum_by_tiles(0, halves({big, 1, 0, 1}), halves({1, 1, 1, 1})) == big + 2);
    CHECK(sum_by_tiles(big, halves({1, 1}), halves({1, 1})) == big + 2);
    // Subnormal operands and sums are zero; the sign stays.
    CHECK(same(sum_by_tiles(0, halves({0.5f * kSmallest, 0}), halves({1024, 0})), 0));
    CHECK(same(sum_by_tiles(0, halves({kSmallest, 0}), halves({0.5f, 0})), 0));
    CHECK(same(sum_by_tiles(64 * tiny, halves({0, 0}), halves({0, 0})), 0));
    CHECK(same(sum_by_tiles(-0.75f * kSmallest, halves({-0.0f, -0.0f}), halves({1, 1})), 0));
    CHECK(same(sum_by_tiles(1, halves({kSmallest, 0}), halves({1, 0})), 1));
    CHECK(std::isnan(sum_by_tiles(0, halves({INFINITY, 0}), halves({0, 0}))));
    CHECK(sum_by_tiles(0, halves({INFINITY, 3}), halves({1, 1})) == INFINITY);

    std::mt19937 engine(1);
    std::uniform_int_distribution<int> member(0, 65535), exponent(100, 154);
    for (int round = 0; round < 3000; ++round) {
        std::vector<uint16_t> a, b;
        for (int i = 0; i < 2 * (1 + round % 16); ++i) {
            // Every bit pattern; and numbers whose products are near one another, some of them subnormal.
            const int bits = member(engine), near = round % 3 == 1 ? 127 : 64;
            a.push_back(static_cast<uint16_t>(round % 3 ? (bits & 0x807f) | (near + bits / 8192 % 4) << 7 : bits));
            const int other = member(engine);
            b.push_back(static_cast<uint16_t>(round % 3 ? (other & 0x807f) | (near + other / 8192 % 4) << 7 : other));
        }
        const float sum = round % 2 ? std::ldexp(1.7f, exponent(engine) - 127 - (round % 3 == 2 ? 127 : 0)) : 0.0f;
        CHECK(same(sum_by_tiles(sum, a, b), sum_of(sum, a, b)));
    }
}

void tiles_multiply_every_row_with_every_column() {
    if (highest_isa() < Isa::kAmx) return;
    for (const auto& [m, k, n] : {std::tuple{16, 16, 16}, {3, 5, 7}, {16, 1, 2}, {1, 16, 16}}) {
        const std::vector<uint16_t> a = halves(normal(m * 2 * k, 1)), b = halves(normal(k * 2 * n, 2));
        std::vector<float> sums = normal(m * n, 3), exact = sums;
        for (int i = 0; i < m * n; ++i) {
            std::vector<uint16_t> row, column;
            for (int p = 0; p < 2 * k; ++p) {
                row.push_back(a[i / n * 2 * k + p]);
                column.push_back(b[p / 2 * 2 * n + i % n * 2 + p % 2]);
            }
            exact[i] = sum_of(sums[i], row, column);
        }
        tile_loadconfig(shapes(m, k, n).bytes);
        tile_loadd(0, sums.data(), 4 * n);
        tile_loadd(1, a.data(), 4 * k);
        tile_loadd(2, b.data(), 4 * n);
        tile_dpbf16ps(0, 1, 2);
        tile_stored(0, sums.data(), 4 * n);
        CHECK(sums == exact);
        tile_zero(0);
        tile_stored(0, sums.data(), 4 * n);
        for (float v : sums) CHECK(same(v, 0));
        tile_release();
    }
}

void tiles_are_refused_where_the_processor_would() {
    float memory[16 * 16]{};
    const std::string none = "tiles are not configured (LDTILECFG comes first, TILERELEASE last)";
    CHECK(refusal([] { tile_zero(0); }) == "emulated AMX: TILEZERO: " + none);
    CHECK(refusal([&] { tile_loadd(4, memory, 64); }) == "emulated AMX: TILELOADD: " + none);
    CHECK(refusal([&] { tile_stored(0, memory, 64); }) == "emulated AMX: TILESTORED: " + none);
    CHECK(refusal([] { tile_dpbf16ps(0, 4, 6); }) == "emulated AMX: TDPBF16PS: " + none);
    CHECK(refusal([] {
              tile_loadconfig(shapes(16, 16, 16).bytes);
              tile_release();
              tile_zero(0);
          }) == "emulated AMX: TILEZERO: " + none);
    CHECK(refusal([] {
              tile_loadconfig(Config().bytes);  // palette 0 is no configuration
              tile_zero(0);
          }) == "emulated AMX: TILEZERO: " + none);

    const auto with = [](const Config& config, const std::function<void()>& then) {
        return refusal([&] {
            tile_loadconfig(config.bytes);
            then();
        });
    };
    const auto nothing = [] {};
    const Config good = shapes(16, 16, 16);
    CHECK(with(good, [] { tile_zero(3); }) == "emulated AMX: TILEZERO: tile 3 was configured without rows");
    CHECK(with(good, [] { tile_zero(8); }) == "emulated AMX: TILEZERO: there is no tile 8, 0 to 7 are there");
    CHECK(with(good, [] { tile_dpbf16ps(0, 1, 1); }) == "emulated AMX: TDPBF16PS: its three tiles must differ");
    CHECK(with(Config(good).tile(1, 16, 60), [] { tile_dpbf16ps(0, 1, 2); }) ==
          "emulated AMX: TDPBF16PS: the shapes of its tiles do not fit");
    CHECK(with(Config(good).tile(1, 16, 63), [] { tile_dpbf16ps(0, 1, 2); }) ==
          "emulated AMX: TDPBF16PS: rows must be multiples of 4 bytes");
    const std::string tile = "emulated AMX: LDTILECFG: tile ";
    CHECK(with(Config(good).tile(5, 17, 64), nothing) ==
          tile + "5 of 17 rows of 64 bytes; 16 rows of 64 bytes are there");
    CHECK(with(Config(good).tile(5, 0, 64), nothing) == tile + "5 of 0 rows of 64 bytes; both or neither must be zero");
    CHECK(with(Config(good).tile(9, 1, 4), nothing) == tile + "9 of 1 rows of 4 bytes; 0 to 7 are there");
    Config config = good;
    config.bytes[0] = 2;
    CHECK(with(config, nothing) == "emulated AMX: LDTILECFG: there is no palette 2, 0 and 1 are there");
    config = good;
    config.bytes[7] = 1;
    CHECK(with(config, nothing) == "emulated AMX: LDTILECFG: bytes 1 to 15 must be zero, got byte 7");
}

}  // namespace microtome::test

#endif
