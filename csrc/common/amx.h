// The tile unit that AMX is, for delta_linear_tiles.h and topk_encode_amx.cpp, and the one that stands in for it where
// a build with MICROTOME_EMULATE_AMX meets a processor without AMX. They differ in who executes an instruction, no
// more.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(MICROTOME_EMULATE_AMX)
#include "emulator/amx.h"
#endif

namespace microtome {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
constexpr TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The intrinsics take a tile's number as a token, not as a constant.
struct Amx {
    static void configure() { _tile_loadconfig(&kTileConfig); }
    static void release() { _tile_release(); }

    template <int c>
    void zero() {
        if constexpr (c == 0) _tile_zero(0);
        if constexpr (c == 1) _tile_zero(1);
        if constexpr (c == 2) _tile_zero(2);
        if constexpr (c == 3) _tile_zero(3);
    }

    template <int t>
    void load(const void* from, int64_t stride) {
        asm volatile("" ::: "memory");  // the intrinsic does not say that it reads memory
        if constexpr (t == 4) _tile_loadd(4, from, stride);
        if constexpr (t == 5) _tile_loadd(5, from, stride);
        if constexpr (t == 6) _tile_loadd(6, from, stride);
        if constexpr (t == 7) _tile_loadd(7, from, stride);
    }

    template <int c, int rows, int weights>
    void multiply() {
        static_assert(rows == 4 + c / 2 && weights == 6 + c % 2, "");
        if constexpr (c == 0) _tile_dpbf16ps(0, 4, 6);
        if constexpr (c == 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (c == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (c == 3) _tile_dpbf16ps(3, 5, 7);
    }

    template <int c>
    void store(float* to, int64_t stride) {
        if constexpr (c == 0) _tile_stored(0, to, stride);
        if constexpr (c == 1) _tile_stored(1, to, stride);
        if constexpr (c == 2) _tile_stored(2, to, stride);
        if constexpr (c == 3) _tile_stored(3, to, stride);
    }
};

#if defined(MICROTOME_EMULATE_AMX)
struct EmulatedAmx {
    static void configure() { emulated::tile_loadconfig(&kTileConfig); }
    static void release() { emulated::tile_release(); }

    template <int c>
    void zero() {
        emulated::tile_zero(c);
    }

    template <int t>
    void load(const void* from, int64_t stride) {
        emulated::tile_loadd(t, from, stride);
    }

    template <int c, int rows, int weights>
    void multiply() {
        emulated::tile_dpbf16ps(c, rows, weights);
    }

    template <int c>
    void store(float* to, int64_t stride) {
        emulated::tile_stored(c, to, stride);
    }
};
#else
using EmulatedAmx = Amx;  // never chosen: amx_is_emulated() is false
#endif

// While it lives, its thread's tiles are configured.
template <class Unit>
struct TilesInUse {
    TilesInUse() { Unit::configure(); }
    ~TilesInUse() { Unit::release(); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

}  // namespace
}  // namespace microtome
