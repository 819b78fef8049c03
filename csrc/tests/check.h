// A test is a function that calls CHECK; main.cpp lists them. Buffers are exact in size, so AddressSanitizer sees a
// read or write past their end.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "common/isa.h"

namespace microtome::test {

inline int failures = 0;

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
            ++microtome::test::failures;                                              \
        }                                                                             \
    } while (0)

inline std::vector<float> normal(int64_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> draw;
    std::vector<float> out(static_cast<size_t>(count));
    for (float& v : out) v = draw(engine);
    return out;
}

// The levels this processor has, or emulates, from generic up.
inline std::vector<Isa> levels() {
    std::vector<Isa> out;
    for (int level = 0; level <= static_cast<int>(highest_isa()); ++level) out.push_back(static_cast<Isa>(level));
    return out;
}

template <class T>
uintptr_t address(const std::vector<T>& v) {
    return v.empty() ? 0 : reinterpret_cast<uintptr_t>(v.data());
}

}  // namespace microtome::test
