// Numbers as the kernels read, order and round them; bf16 is kept as its bits.
#pragma once

#include "cuda/device.cuh"

namespace microtome::cuda {

using Bf16 = uint16_t;

inline __device__ float widen(float v) { return v; }
inline __device__ float widen(Bf16 v) { return __uint_as_float(static_cast<unsigned>(v) << 16); }

// To the nearest, ties to even.
inline __device__ Bf16 to_bf16(float v) {
    const unsigned bits = __float_as_uint(v);
    return static_cast<Bf16>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

template <class T>
__device__ T narrow(float v);
template <>
inline __device__ float narrow<float>(float v) {
    return v;
}
template <>
inline __device__ Bf16 narrow<Bf16>(float v) {
    return to_bf16(v);
}

// float32 as an unsigned integer of the same order; -0.0 becomes what 0.0 is.
inline __device__ uint32_t ordered(float v) {
    const uint32_t bits = __float_as_uint(v == 0.0f ? 0.0f : v);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline __device__ float unordered(uint32_t order) {
    return __uint_as_float(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

// 16 bytes of a row as floats: 4 of float32, 8 of bf16.
inline __device__ void unpack(const uint4& words, float (&out)[4]) {
    out[0] = __uint_as_float(words.x);
    out[1] = __uint_as_float(words.y);
    out[2] = __uint_as_float(words.z);
    out[3] = __uint_as_float(words.w);
}
inline __device__ void unpack(const uint4& words, float (&out)[8]) {
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(word[i] << 16);
        out[2 * i + 1] = __uint_as_float(word[i] & 0xFFFF0000u);
    }
}

// Whether 16 bytes can be loaded at a time from rows of `bytes` bytes.
inline bool in_sixteens(uintptr_t address, int64_t bytes) { return address % 16 == 0 && bytes % 16 == 0; }

inline int64_t up_to_power(int64_t n) {
    int64_t power = 1;
    while (power < n) power *= 2;
    return power;
}

}  // namespace microtome::cuda
