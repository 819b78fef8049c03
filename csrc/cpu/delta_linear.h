// delta_linear: y = y_base[index] + bf16(x - x_base[index]) W^T + add over weights in bfloat16 panels of 32 outputs.
#pragma once

#include <cstdint>
#include <string>

#include "common/panels.h"

namespace microtome::cpu {

// x [T, i], x_base [r, i], y_base [r, o], add [T, o] or 0, each with a row stride; index [T] int32; packed
// [ceil(o/32), 16 ceil(i/32), 32, 2] -> y [T, o]. Returns the first position whose index lies outside [0, r), and then
// has written nothing, or -1.
int64_t delta_linear(uintptr_t x, int64_t x_stride, uintptr_t x_base, int64_t x_base_stride, uintptr_t y_base,
                     int64_t y_base_stride, uintptr_t index, uintptr_t packed, uintptr_t add, int64_t add_stride,
                     uintptr_t y, int64_t T, int64_t r, int64_t i, int64_t o, const std::string& isa, int threads);

extern const PanelKernels kDeltaLinearAvx2, kDeltaLinearAvx512, kDeltaLinearAvx512Bf16;
extern const PanelKernels kDeltaLinearAmx[2];  // the second on the emulated unit

}  // namespace microtome::cpu
