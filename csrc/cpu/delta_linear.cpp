#include "cpu/delta_linear.h"

#include "common/isa.h"
#include "common/segments.h"
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

const PanelKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    switch (isa_from_name(isa.c_str())) {
        case Isa::kAmx:
            return kDeltaLinearAmx;
        case Isa::kAvx512Bf16:
            return kDeltaLinearAvx512Bf16;
        case Isa::kAvx512:
            return kDeltaLinearAvx512;
        case Isa::kAvx2:
            return kDeltaLinearAvx2;
        default:
            break;
    }
#else
    static_cast<void>(isa);
#endif
    return kPanelKernels<Tiles<PlainUnit>>;
}

}  // namespace

int64_t delta_linear(uintptr_t x, int64_t x_stride, uintptr_t x_base, int64_t x_base_stride, uintptr_t y_base,
                     int64_t y_base_stride, uintptr_t index, uintptr_t packed, uintptr_t add, int64_t add_stride,
                     uintptr_t y, int64_t T, int64_t r, int64_t i, int64_t o, const std::string& isa, int threads) {
    PanelProduct p{};
    p.T = T, p.i = i, p.o = o;
    p.x = reinterpret_cast<const float*>(x), p.x_stride = x_stride;
    p.x_base = reinterpret_cast<const float*>(x_base), p.x_base_stride = x_base_stride;
    p.index = reinterpret_cast<const int32_t*>(index);
    p.packed = reinterpret_cast<const void*>(packed);
    p.y_base = reinterpret_cast<const float*>(y_base), p.y_base_stride = y_base_stride;
    p.add = reinterpret_cast<const float*>(add), p.add_stride = add_stride;
    p.y = reinterpret_cast<float*>(y);
    const int64_t bad = first_outside(p.index, T, r);
    if (bad < 0) run_panels(p, kernels(isa), threads);
    return bad;
}

}  // namespace microtome::cpu
