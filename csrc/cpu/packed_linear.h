// packed_linear: y = x W^T + bias + add over weights in float32 panels of 32 outputs.
#pragma once

#include <cstdint>
#include <string>

#include "common/panels.h"

namespace microtome::cpu {

// x [T, i] with a row stride, packed [ceil(o/32), i, 32], bias [o] or 0, add [T, o] with a row stride or 0 -> y [T, o].
void packed_linear(uintptr_t x, int64_t x_stride, uintptr_t packed, uintptr_t bias, uintptr_t add, int64_t add_stride,
                   uintptr_t y, int64_t T, int64_t i, int64_t o, const std::string& isa, int threads);

extern const PanelKernels kPackedLinearAvx2, kPackedLinearAvx512;

}  // namespace microtome::cpu
