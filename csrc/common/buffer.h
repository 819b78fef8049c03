// Working memory whose lines and pages begin where the processor's do. For portable files only: see simd.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace microtome {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// `bytes` uninitialised bytes from a page's start, up to a page's end.
inline Buffer aligned(int64_t bytes) {
    constexpr int64_t kPage = 4096;
    const int64_t pages = (bytes + kPage - 1) / kPage;
    char* p = static_cast<char*>(std::aligned_alloc(kPage, static_cast<size_t>((pages ? pages : 1) * kPage)));
    if (!p) throw std::bad_alloc();
    return Buffer(p);
}

}  // namespace microtome
