// Rows of float32 or bf16, four columns a thread at a time, and sums over a block in a fixed order.
#pragma once

#include "cuda/device.cuh"
#include "cuda/numbers.cuh"

namespace microtome::cuda {

// Columns [at, at + 4) of a row of d; those from d on are zero. kWhole: d is a multiple of 4 and rows are aligned.
template <bool kWhole>
__device__ float4 load4(const float* row, int at, int d) {
    if constexpr (kWhole) {
        return at < d ? *reinterpret_cast<const float4*>(row + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    } else {
        return make_float4(at < d ? row[at] : 0.0f, at + 1 < d ? row[at + 1] : 0.0f, at + 2 < d ? row[at + 2] : 0.0f,
                           at + 3 < d ? row[at + 3] : 0.0f);
    }
}

// bf16 stays packed until it is added: rows in flight take half the registers.
template <bool kWhole>
__device__ uint2 load4(const Bf16* row, int at, int d) {
    if constexpr (kWhole) {
        return at < d ? *reinterpret_cast<const uint2*>(row + at) : make_uint2(0u, 0u);
    } else {
        const unsigned a = at < d ? row[at] : 0u, b = at + 1 < d ? row[at + 1] : 0u;
        const unsigned c = at + 2 < d ? row[at + 2] : 0u, e = at + 3 < d ? row[at + 3] : 0u;
        return make_uint2(a | b << 16, c | e << 16);
    }
}

template <class Row>
struct Packed;  // four columns as they are loaded
template <>
struct Packed<float> {
    using Type = float4;
    static __device__ Type zero() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
};
template <>
struct Packed<Bf16> {
    using Type = uint2;
    static __device__ Type zero() { return make_uint2(0u, 0u); }
};

// The same of what is read once, so that it leaves the cache to what is read again.
template <bool kWhole>
__device__ float4 stream4(const float* row, int at, int d) {
    if constexpr (kWhole) {
        return at < d ? __ldcs(reinterpret_cast<const float4*>(row + at)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    } else {
        return load4<false>(row, at, d);
    }
}

template <bool kWhole>
__device__ void store4(float* row, int at, int d, const float4& v) {
    if constexpr (kWhole) {
        if (at < d) __stcs(reinterpret_cast<float4*>(row + at), v);
    } else {
        if (at < d) row[at] = v.x;
        if (at + 1 < d) row[at + 1] = v.y;
        if (at + 2 < d) row[at + 2] = v.z;
        if (at + 3 < d) row[at + 3] = v.w;
    }
}

template <bool kWhole>
__device__ void store4(Bf16* row, int at, int d, const Bf16 (&v)[4]) {
    if constexpr (kWhole) {
        if (at < d) {
            *reinterpret_cast<uint2*>(row + at) =
                make_uint2(v[0] | static_cast<unsigned>(v[1]) << 16, v[2] | static_cast<unsigned>(v[3]) << 16);
        }
    } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (at + c < d) row[at + c] = v[c];
        }
    }
}

__device__ inline void add(float4& sum, float weight, const float4& v) {
    sum.x = __fmaf_rn(weight, v.x, sum.x);
    sum.y = __fmaf_rn(weight, v.y, sum.y);
    sum.z = __fmaf_rn(weight, v.z, sum.z);
    sum.w = __fmaf_rn(weight, v.w, sum.w);
}

__device__ inline void add(float4& sum, float weight, const uint2& v) {
    add(sum, weight,
        make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000u), __uint_as_float(v.y << 16),
                    __uint_as_float(v.y & 0xFFFF0000u)));
}

__device__ inline float dot(const float4& a, const float4& b, float sum) {
    return __fmaf_rn(a.w, b.w, __fmaf_rn(a.z, b.z, __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, sum))));
}

__device__ inline float warp_sum(float v) {
#pragma unroll
    for (int flip = 16; flip > 0; flip /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, flip);
    return v;
}

// Sums over the block, for every thread: lanes as a tree, then warps in order. `scratch` holds kSums floats a warp and
// may not be written again before the block's next barrier.
template <int kSums>
__device__ void block_sum(float (&v)[kSums], float* scratch) {
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        v[i] = warp_sum(v[i]);
        if (threadIdx.x % 32 == 0) scratch[warp * kSums + i] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        v[i] = 0.0f;
        for (int w = 0; w < warps; ++w) v[i] += scratch[w * kSums + i];
    }
}

}  // namespace microtome::cuda
