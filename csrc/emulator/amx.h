// The tile unit that AMX is, for processors without one: what common/amx.h asks for, so that tests run level amx there.
//
// Each function is written from the operation that Intel's Software Developer's Manual gives for the instruction of its
// name, not from the kernels that call it, and throws std::runtime_error where the processor would raise an exception.
// Tiles belong to the thread, as registers do. A level above avx512 is what the product needs of the processor.
#pragma once

#include <cstdint>

namespace microtome::emulated {

// LDTILECFG: 64 bytes as they lie in memory. Every tile is zero afterwards.
void tile_loadconfig(const void* at);
// TILERELEASE.
void tile_release();

// TILEZERO.
void tile_zero(int tile);
// TILELOADD: the configured bytes of each row, rows `stride` bytes apart; the rest of the tile is zero.
void tile_loadd(int tile, const void* from, int64_t stride);
// TILESTORED.
void tile_stored(int tile, void* to, int64_t stride);

// TDPBF16PS: sums += a b over pairs of bfloat16. The even members of a row's pairs are added up from zero in order, by
// fma, and so are the odd ones; then sums + (even + odd). Every step rounds to nearest, ties to even, takes subnormal
// numbers for zero and makes zero of them, whatever the thread's MXCSR says.
void tile_dpbf16ps(int sums, int a, int b);

}  // namespace microtome::emulated
