// Storage types. bfloat16 is carried as its bits; simd.h widens and narrows it.
#pragma once

#include <cstdint>

namespace microtome {

using bf16 = uint16_t;

}  // namespace microtome
