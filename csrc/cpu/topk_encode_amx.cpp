// Screening in bf16 on AMX tiles: 32 features x 32 rows a step, weights read as they lie, x packed in pairs.
#include "common/amx.h"
#include "cpu/screen_row.h"
#include "cpu/topk_encode_exact.h"
#include "cpu/topk_encode_screen.h"

namespace microtome::cpu {
namespace {

constexpr int kFeatures = 32;
constexpr int kRows = 2 * kPanel;

// Tiles 0-3 are the sums of features 0-15 and 16-31 with rows 0-15 and 16-31; 4 and 5 hold weights as they lie in
// memory, 6 and 7 packed rows of x.
template <class Unit>
inline void tile(const int16_t* w, int64_t stride, const int16_t* x, int64_t padded, float (&out)[kFeatures][kRows]) {
    const int16_t* second_w = w + 16 * stride;
    const int16_t* second_x = x + kPanel * padded;
    const int64_t bytes = stride * 2, out_bytes = kRows * 4;
    Unit unit;
    unit.template zero<0>();
    unit.template zero<1>();
    unit.template zero<2>();
    unit.template zero<3>();
    for (int64_t i = 0; i < padded; i += 32) {  // a tile row holds 32 columns
        unit.template load<4>(w + i, bytes);
        unit.template load<6>(x + i * kPanel, 64);
        unit.template multiply<0, 4, 6>();
        unit.template load<7>(second_x + i * kPanel, 64);
        unit.template multiply<1, 4, 7>();
        unit.template load<5>(second_w + i, bytes);
        unit.template multiply<2, 5, 6>();
        unit.template multiply<3, 5, 7>();
    }
    unit.template store<0>(out[0], out_bytes);
    unit.template store<1>(out[0] + kPanel, out_bytes);
    unit.template store<2>(out[16], out_bytes);
    unit.template store<3>(out[16] + kPanel, out_bytes);
}

template <class Unit>
void screen(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1) {
    const TilesInUse<Unit> tiles;
    screen_tiles<kFeatures, kRows>(s, f0, f1, r0, r1, tile<Unit>);
}

template <class Unit>
constexpr TopkKernels kOn = {screen<Unit>, kRows, 0, screen_exact, rescore, best_first, screen_row};

}  // namespace

const TopkKernels topk_amx[2] = {kOn<Amx>, kOn<EmulatedAmx>};

}  // namespace microtome::cpu
