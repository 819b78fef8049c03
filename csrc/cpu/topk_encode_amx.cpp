// Screening in bf16 on AMX tiles: 32 features x 32 rows a step, weights read as they lie, x packed in pairs.
#include <immintrin.h>

#include "cpu/screen_row.h"
#include "cpu/topk_encode_exact.h"
#include "cpu/topk_encode_screen.h"

namespace microtome::cpu {
namespace {

constexpr int kFeatures = 32;
constexpr int kRows = 2 * kPanel;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0-3 are the sums of features 0-15 and 16-31 with rows 0-15 and 16-31; 4 and 5 hold weights as they lie in
// memory, 6 and 7 packed rows of x.
inline void tile(const int16_t* w, int64_t stride, const int16_t* x, int64_t padded, float (&out)[kFeatures][kRows]) {
    const int16_t* second_w = w + 16 * stride;
    const int16_t* second_x = x + kPanel * padded;
    const size_t bytes = static_cast<size_t>(stride) * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < padded; i += 32) {  // a tile row holds 32 columns
        _tile_loadd(4, w + i, bytes);
        _tile_loadd(6, x + i * kPanel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second_x + i * kPanel, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, second_w + i, bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out[0], kRows * 4);
    _tile_stored(1, out[0] + kPanel, kRows * 4);
    _tile_stored(2, out[16], kRows * 4);
    _tile_stored(3, out[16] + kPanel, kRows * 4);
}

void screen(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    screen_tiles<kFeatures, kRows>(s, f0, f1, r0, r1, tile);
    _tile_release();
}

}  // namespace

const TopkKernels topk_amx = {screen, kRows, 0, screen_exact, rescore, screen_row};

}  // namespace microtome::cpu
