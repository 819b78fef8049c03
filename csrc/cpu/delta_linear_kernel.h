// What the levels of delta_linear share: the layout of a bfloat16 panel, and a line of differences.
#pragma once

#include "common/panel_kernel.h"
#include "cpu/delta_linear.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kLineColumns = 32;                 // bfloat16 columns of a line
constexpr int64_t kPairBytes = kPanelLanes * 2 * 2;  // two inputs of a panel's outputs

inline int64_t lines_of(int64_t i) { return (i + kLineColumns - 1) / kLineColumns; }
inline int64_t bf16_panel_bytes(int64_t i) { return lines_of(i) * (kLineColumns / 2) * kPairBytes; }

// line [32] bfloat16 = n columns of x less those of base, which may be null.
inline void pack_bf16_line(char* line, const float* x, const float* base, int64_t n) {
    const auto columns = [=](int64_t c) { return difference(x + c, base ? base + c : nullptr, n - c); };
#if defined(__AVX512BF16__)
    // Flushes subnormals, which the products of these levels take for zero anyway.
    const __m512bh both = _mm512_cvtne2ps_pbh(columns(16), columns(0));
    std::memcpy(line, &both, sizeof both);
#else
    bf16* out = reinterpret_cast<bf16*>(line);
    for (int64_t c = 0; c < kLineColumns; c += kWidth) store(out + c, columns(c));
#endif
}

}  // namespace
}  // namespace microtome::cpu
