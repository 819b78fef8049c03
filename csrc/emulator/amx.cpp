#include "emulator/amx.h"

#include <immintrin.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace microtome::emulated {
namespace {

// Palette 1, the only one there is.
constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
    alignas(64) unsigned char row[kRows][kRowBytes];
    int rows, row_bytes;  // 0, 0: not valid
};

struct State {
    bool configured = false;
    Tile tiles[kTiles]{};
};

State& state() {
    thread_local State s;
    return s;
}

[[noreturn]] void undefined(const std::string& what) { throw std::runtime_error("emulated AMX: " + what); }

Tile& valid(int t, const char* instruction) {
    const std::string name = std::string(instruction) + ": ";
    if (!state().configured) undefined(name + "tiles are not configured (LDTILECFG comes first, TILERELEASE last)");
    if (t < 0 || t >= kTiles) undefined(name + "there is no tile " + std::to_string(t) + ", 0 to 7 are there");
    if (!state().tiles[t].rows) undefined(name + "tile " + std::to_string(t) + " was configured without rows");
    return state().tiles[t];
}

void clear(Tile& tile) { std::memset(tile.row, 0, sizeof tile.row); }

// The product by itself: nothing of it may move to where MXCSR is another.
__attribute__((noinline, target("avx512f"))) void multiply(Tile& sums, const Tile& a, const Tile& b) {
    const __m512i odd_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int m = 0; m < sums.rows; ++m) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < b.rows; ++k) {
            int pair;
            std::memcpy(&pair, a.row[m] + 4 * k, sizeof pair);
            const __m512i x = _mm512_set1_epi32(pair), w = _mm512_load_si512(b.row[k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, odd_half)),
                                  _mm512_castsi512_ps(_mm512_and_si512(w, odd_half)), odd);
        }
        float* row = reinterpret_cast<float*>(sums.row[m]);
        _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_add_ps(even, odd)));
        std::memset(sums.row[m] + sums.row_bytes, 0, static_cast<size_t>(kRowBytes - sums.row_bytes));
    }
}

}  // namespace

void tile_loadconfig(const void* at) {
    unsigned char bytes[64];
    std::memcpy(bytes, at, sizeof bytes);
    State next;
    if (bytes[0] > 1) undefined("LDTILECFG: there is no palette " + std::to_string(bytes[0]) + ", 0 and 1 are there");
    for (int i = 1; i < 16 && bytes[0]; ++i) {
        // A start row is where an interrupted load goes on; no program has a reason to set it.
        if (bytes[i]) undefined("LDTILECFG: bytes 1 to 15 must be zero, got byte " + std::to_string(i));
    }
    for (int t = 0; t < kRows && bytes[0]; ++t) {
        const int row_bytes = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8, rows = bytes[48 + t];
        const std::string what = "LDTILECFG: tile " + std::to_string(t) + " of " + std::to_string(rows) + " rows of " +
                                 std::to_string(row_bytes) + " bytes; ";
        if (t >= kTiles && (rows || row_bytes)) undefined(what + "0 to 7 are there");
        if (rows > kRows || row_bytes > kRowBytes) undefined(what + "16 rows of 64 bytes are there");
        if (!rows != !row_bytes) undefined(what + "both or neither must be zero");
        if (t < kTiles) next.tiles[t].rows = rows, next.tiles[t].row_bytes = row_bytes;
    }
    next.configured = bytes[0] == 1;
    state() = next;
}

void tile_release() { state() = State{}; }

void tile_zero(int t) { clear(valid(t, "TILEZERO")); }

void tile_loadd(int t, const void* from, int64_t stride) {
    Tile& tile = valid(t, "TILELOADD");
    clear(tile);
    const auto* row = static_cast<const unsigned char*>(from);
    for (int m = 0; m < tile.rows; ++m) {
        std::memcpy(tile.row[m], row + m * stride, static_cast<size_t>(tile.row_bytes));
    }
}

void tile_stored(int t, void* to, int64_t stride) {
    const Tile& tile = valid(t, "TILESTORED");
    auto* row = static_cast<unsigned char*>(to);
    for (int m = 0; m < tile.rows; ++m) {
        std::memcpy(row + m * stride, tile.row[m], static_cast<size_t>(tile.row_bytes));
    }
}

void tile_dpbf16ps(int c, int a, int b) {
    const char* const name = "TDPBF16PS";
    Tile &sums = valid(c, name), &left = valid(a, name), &right = valid(b, name);
    if (c == a || a == b || c == b) undefined("TDPBF16PS: its three tiles must differ");
    if (sums.row_bytes % 4 || left.row_bytes % 4 || right.row_bytes % 4) {
        undefined("TDPBF16PS: rows must be multiples of 4 bytes");
    }
    if (sums.rows != left.rows || sums.row_bytes != right.row_bytes || left.row_bytes / 4 != right.rows) {
        undefined("TDPBF16PS: the shapes of its tiles do not fit");
    }
    constexpr unsigned kNoExceptions = 0x1f80, kFlush = 0x8000, kZeros = 0x0040;  // rounding 0: to nearest even
    const unsigned before = _mm_getcsr();
    _mm_setcsr(kNoExceptions | kFlush | kZeros);
    multiply(sums, left, right);
    _mm_setcsr(before);
}

}  // namespace microtome::emulated
