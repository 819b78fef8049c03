#include "common/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace microtome {

void ask_for_large_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 4096;
    const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#else
    static_cast<void>(address);
    static_cast<void>(bytes);
#endif
}

}  // namespace microtome
