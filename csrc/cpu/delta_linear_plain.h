// The tile unit of delta_linear_tiles.h in plain code.
#pragma once

#include "cpu/delta_linear_tiles.h"

namespace microtome::cpu {
namespace {

// The tile unit in plain code: operands are widened as they are loaded. The portable level, and the one on which the
// order of loads and stores is tested where there is no AMX.
class PlainUnit {
  public:
    template <int c>
    void zero() {
        std::memset(sums_[c], 0, sizeof sums_[c]);
    }

    template <int t>
    void load(const char* from, int64_t stride) {
        for (int line = 0; line < 16; ++line) {
            bf16 pairs[16][2];
            std::memcpy(pairs, from + line * stride, sizeof pairs);
            for (int q = 0; q < 16; ++q) {
                for (int e = 0; e < 2; ++e) {
                    // Rows: column 2 q + e of a row. Weights: column 2 line + e of output q.
                    float& to = t < 6 ? tiles_[t - 4][line * 32 + 2 * q + e] : tiles_[t - 4][(2 * line + e) * 16 + q];
                    to = widen(pairs[q][e]);
                }
            }
        }
    }

    template <int c, int rows, int weights>
    void multiply() {
        for (int r = 0; r < 16; ++r) {
            vf s[kParts];
            for (int p = 0; p < kParts; ++p) s[p] = microtome::load(sums_[c] + r * 16 + p * kWidth);
            for (int k = 0; k < 32; ++k) {
                const vf x = set1(tiles_[rows - 4][r * 32 + k]);
                const float* w = tiles_[weights - 4] + k * 16;
                for (int p = 0; p < kParts; ++p) s[p] = fma(x, microtome::load(w + p * kWidth), s[p]);
            }
            for (int p = 0; p < kParts; ++p) microtome::store(sums_[c] + r * 16 + p * kWidth, s[p]);
        }
    }

    template <int c>
    void store(float* to, int64_t stride) {
        for (int r = 0; r < 16; ++r) std::memcpy(to + r * stride / 4, sums_[c] + r * 16, 64);
    }

  private:
    float sums_[4][16 * 16];
    float tiles_[4][32 * 16];
};

}  // namespace
}  // namespace microtome::cpu
