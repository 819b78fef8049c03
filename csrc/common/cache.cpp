#include "common/cache.h"

#include <unistd.h>

#include <algorithm>

namespace microtome {

int64_t second_level_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t size = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 << 10);
#else
    static const int64_t size = 512 << 10;
#endif
    return size;
}

}  // namespace microtome
