// The sorted entries of a step: their weights, where each latent's begin, and the sums of full chunks.
#include "cuda/device.cuh"
#include "cuda/rows.cuh"
#include "cuda/sae_update.h"

namespace microtome::cuda {
namespace {

template <class Row>
__global__ void __launch_bounds__(256) entries_kernel(Entries e, Code code, Code aux) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (place >= e.m) return;
    const int64_t entry = at<const int64_t>(e.order)[place], main = e.n * code.k;
    const bool is_main = entry < main;
    const int64_t mine = is_main ? entry : entry - main;
    const float value = widen(at<const Row>(is_main ? code.values : aux.values)[mine]);
    const float slope = widen(at<const Row>(is_main ? code.grad_values : aux.grad_values)[mine]);
    const float scale = is_main ? code.scale : aux.scale;
    at<float>(e.weight)[place] = scale * value;
    at<float>(e.grad_weight)[place] = scale * slope;
    at<int32_t>(e.source)[place] = static_cast<int32_t>(is_main ? mine / code.k : e.n + mine / aux.k);
    at<uint8_t>(e.flags)[place] = static_cast<uint8_t>((is_main && value > 0.0f ? 1 : 0) | (value != 0.0f ? 2 : 0));
}

// The first place whose latent is not below `latent`.
__device__ int lower_bound(const int32_t* latents, int64_t m, int64_t latent) {
    int64_t low = 0, high = m;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (latents[middle] < latent) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return static_cast<int>(low);
}

// A warp per latent.
__global__ void __launch_bounds__(256) segments_kernel(Entries e) {
    const int64_t latent = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (latent >= e.f) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto* const latents = at<const int32_t>(e.latents);
    const int begin = lower_bound(latents, e.m, latent), end = lower_bound(latents, e.m, latent + 1);
    const auto* const slope = at<const float>(e.grad_weight);
    const auto* const flags = at<const uint8_t>(e.flags);
    float sum = 0.0f;
    int fired = 0, touched = 0;
#pragma unroll 8
    for (int i = begin + lane; i < end; i += 32) {
        sum += slope[i];
        fired += flags[i] & 1;
        touched |= flags[i] & 2;
    }
    sum = warp_sum(sum);
    for (int flip = 16; flip > 0; flip /= 2) fired += __shfl_xor_sync(0xFFFFFFFFu, fired, flip);
    touched = __any_sync(0xFFFFFFFFu, touched);
    if (lane != 0) return;
    at<int32_t>(e.offsets)[latent] = begin;
    if (latent == e.f - 1) at<int32_t>(e.offsets)[e.f] = end;
    at<float>(e.bias_grad)[latent] = sum;
    at<int32_t>(e.fired)[latent] = fired;
    at<int32_t>(e.touched)[latent] = touched;
}

constexpr int kAhead = 8, kColumns = 4 * 256;  // rows read at once; columns of a block

// A chunk [a, a + kChunk) has slot ceil(a / kChunk), so it contains the entry slot * kChunk.
template <class Row, bool kWhole>
__global__ void __launch_bounds__(256)
    chunks_kernel(Entries e, const Row* x, const Row* grad_out, const Row* aux_grad_out) {
    const int64_t slot = blockIdx.x, entry = slot * kChunk;
    const int d = static_cast<int>(e.d),
              column = static_cast<int>(blockIdx.y) * kColumns + 4 * static_cast<int>(threadIdx.x);
    const int64_t latent = at<const int32_t>(e.latents)[entry];
    const int64_t begin = at<const int32_t>(e.offsets)[latent], end = at<const int32_t>(e.offsets)[latent + 1];
    const int64_t first = begin + (entry - begin) / kChunk * kChunk;
    if (end - begin <= kChunk || first + kChunk > end || column >= d) return;
    const bool encoder = blockIdx.z == 1;
    const float* const weight = at<const float>(encoder ? e.grad_weight : e.weight) + first;
    const int32_t* const source = at<const int32_t>(e.source) + first;
    const Row *const table = encoder ? x : grad_out, *const aux = encoder ? x : aux_grad_out;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int i = 0; i < kChunk; i += kAhead) {
        typename Packed<Row>::Type row[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int64_t from = source[i + j];
            row[j] = load4<kWhole>(from < e.n ? table + from * e.d : aux + (from - e.n) * e.d, column, d);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) add(sum, weight[i + j], row[j]);
    }
    float* const partial = at<float>(encoder ? e.enc_partial : e.dec_partial) + slot * e.d;
    if constexpr (kWhole) {
        *reinterpret_cast<float4*>(partial + column) = sum;
    } else {
        store4<false>(partial, column, d, sum);
    }
}

template <class Row>
void sort_rows(const Entries& e, const Code& code, const Code& aux, uintptr_t x, uintptr_t stream) {
    launch("sae_update: entries", entries_kernel<Row>, one_thread_each(e.m, stream), e, code, aux);
    launch("sae_update: segments", segments_kernel, one_thread_each(32 * e.f, stream), e);
    if (e.m <= kChunk) return;
    bool whole = e.d % 4 == 0;
    for (uintptr_t table : {x, code.grad_out, aux.grad_out, e.enc_partial, e.dec_partial}) {
        whole = whole && table % 16 == 0;
    }
    const Geometry geometry{dim3(static_cast<unsigned>((e.m + kChunk - 1) / kChunk),
                                 static_cast<unsigned>((e.d + kColumns - 1) / kColumns), 2),
                            dim3(256), 0, stream};
    launch("sae_update: chunks", whole ? chunks_kernel<Row, true> : chunks_kernel<Row, false>, geometry, e,
           at<const Row>(x), at<const Row>(code.grad_out), at<const Row>(aux.grad_out));
}

}  // namespace

void sort_entries(const Entries& e, const Code& code, const Code& aux, uintptr_t x, uintptr_t stream) {
    (e.narrow ? sort_rows<Bf16> : sort_rows<float>)(e, code, aux, x, stream);
}

}  // namespace microtome::cuda
