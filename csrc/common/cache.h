// The size that blocks of rows are cut for.
#pragma once

#include <cstdint>

namespace microtome {

// Bytes of a core's second-level cache, at least 256 KiB; 512 KiB where the system does not say.
int64_t second_level_cache();

}  // namespace microtome
