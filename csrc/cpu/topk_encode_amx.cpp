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

// out[2 h + v] = 16 features x 16 rows: features 16 h ..., rows 16 v ...
inline void tile(const int16_t* w, int64_t stride, const int16_t* x, int64_t panel, int64_t padded, float (*out)[256]) {
    const int16_t* w1 = w + 16 * stride;
    const int16_t* x1 = x + panel;
    const size_t bytes = static_cast<size_t>(stride) * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < padded; i += 32) {  // one tile row holds 32 columns
        _tile_loadd(4, w + i, bytes);
        _tile_loadd(6, x + i * kPanel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, x1 + i * kPanel, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, w1 + i, bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out[0], 64);
    _tile_stored(1, out[1], 64);
    _tile_stored(2, out[2], 64);
    _tile_stored(3, out[3], 64);
}

// A block has at least kFeatures features (the driver sees to it), so the last step of a range may look back and pass
// over what it has seen.
void screen(const Screening& s, int64_t f0, int64_t f1, int64_t r0, int64_t r1) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    alignas(64) float out[4][256];
    for (int64_t f = f0; f < f1; f += kFeatures) {
        const int64_t start = f + kFeatures <= f1 ? f : (f1 > kFeatures ? f1 - kFeatures : 0);
        for (int64_t r = r0; r < r1; r += kRows) {
            tile(s.shadow + start * s.stride, s.stride, s.packed + r * s.padded, kPanel * s.padded, s.padded, out);
            for (int v = 0; v < 2; ++v) {
                const int64_t row = r + v * kPanel;
                const vf scale = load(s.scale + row), threshold = load(s.threshold + row);
                const vf error_w = load(s.error_w + row), error_r = load(s.error_r + row);
                for (int64_t g = f - start; g < kFeatures && start + g < f1; ++g) {
                    const vf acc = load(out[2 * (g / 16) + v] + (g % 16) * 16);
                    filter(s, row, start + g, acc, scale, error_w, error_r, threshold);
                }
            }
        }
    }
    _tile_release();
}

}  // namespace

const TopkKernels topk_amx = {screen, kRows, 0, screen_exact, rescore, screen_row};

}  // namespace microtome::cpu
