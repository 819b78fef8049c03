// What becomes of a tile of scores: kept features appended to their row's list, or maxima of a sample.
#pragma once

#include "cuda/topk_encode_tile.cuh"

namespace microtome::cuda::encode {

// A norm, or infinity where a sum of products on its way might become -inf, though the value is none: all is kept then.
__device__ __forceinline__ float summable(float norm) { return norm < 0x1p62f ? norm : INFINITY; }

// Append to a row's list every feature whose float32 value may reach the row's threshold. With N = |c| + |c - cb| of a
// row and its bf16 rounding, unit = d 2^-24 (kernels/topk_encode.py proves it):
//     |score - value| <= |w| (|c - cb| + 6 unit N) + |w - wb| N (1 + 4 unit).
// The bound is evaluated in float32 with its terms enlarged by 2e-4 and the threshold lowered by 2e-6 of itself: that
// covers the roundings, each below 2^-24 of |score| and of the bound, because a score that matters lies no farther from
// the threshold than the bound. A bound of NaN keeps its feature.
struct Filter {
    const float4 *x_stats, *w_stats;  // 1, norm, norm of what rounding lost, 0
    const float *bias, *theta;        // bias may be null
    int* count;
    int* index;
    int capacity;
    float unit;

    __device__ __forceinline__ void stage(Features& to, int pair, int feature, int features) const {
        float4 stats[2] = {};
        float biases[2] = {};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (feature + e < features) {
                stats[e] = __ldg(w_stats + feature + e);
                if (bias) biases[e] = __ldg(bias + feature + e);
            }
        }
        to.bias_norm[pair] = make_float4(biases[0], biases[1], summable(stats[0].y), summable(stats[1].y));
        to.lost[pair] = make_float2(stats[0].z, stats[1].z);
    }

    struct Thread {
        const Filter& filter;
        const int lane;
        int row = 0, rows = 0;  // the thread's first row; the other is 8 on
        float4 stats[2];        // of the rows: asked for before the products, looked at after them
        float threshold[2];
        // Of the last tile: bit 2 j + e of 64 is feature first + 8 j + e; where the row's entries go, and the thread's
        // after those of lanes to its left, 16 bits a row.
        uint32_t kept[2][2] = {};
        int base[2] = {}, before = 0, first = 0, kept_row = 0;

        __device__ __forceinline__ Thread(const Filter& filter, int lane) : filter(filter), lane(lane) {}

        __device__ __forceinline__ void begin(int at, int rows_there_are) {
            row = at;
            rows = rows_there_are;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int there = min(row + 8 * h, rows - 1);
                stats[h] = __ldg(filter.x_stats + there);
                threshold[h] = __ldg(filter.theta + there);
            }
        }

        __device__ __forceinline__ void take(const float (&scores)[128], const Features& features, Tile tile,
                                             const Work& work) {
            const int quad = lane % 4;
            float cut[2], of_norm[2], of_lost[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float norm = summable(stats[h].y + stats[h].z);
                cut[h] = threshold[h] - fabsf(threshold[h]) * 2e-6f;
                of_norm[h] = (stats[h].z + 6.0f * filter.unit * norm) * 1.0002f;
                of_lost[h] = norm * (1.0f + 4.0f * filter.unit) * 1.0002f;
                kept[h][0] = kept[h][1] = 0;
            }
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                const float4 bias_norm = features.bias_norm[4 * j + quad];
                const float2 lost = features.lost[4 * j + quad];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float score = scores[4 * j + 2 * h + e] + (e ? bias_norm.y : bias_norm.x);
                        float highest = __fmaf_rn(of_norm[h], e ? bias_norm.w : bias_norm.z, score);
                        highest = __fmaf_rn(of_lost[h], e ? lost.y : lost.x, highest);
                        if (!(highest < cut[h])) kept[h][j / 16] |= 1u << (j % 16 * 2 + e);
                    }
                }
            }
            first = tile.feature + 2 * quad;
            kept_row = row;
            // The bits are in the order of the features, so those beyond the last are the highest.
            const int there = work.features - tile.feature;
            const int bits = 2 * (there / 8) + min(max(there % 8 - 2 * quad, 0), 2);
            int packed = 0;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (bits < 32) kept[h][0] &= (1u << bits) - 1;
                if (bits < 64) kept[h][1] &= bits < 32 ? 0u : (1u << (bits - 32)) - 1;
                if (row + 8 * h >= rows) kept[h][0] = kept[h][1] = 0;
                packed |= (__popc(kept[h][0]) + __popc(kept[h][1])) << 16 * h;
            }
            before = packed;
#pragma unroll
            for (int step = 1; step < 4; step *= 2) {
                const int left = __shfl_up_sync(0xFFFFFFFFu, before, step, 4);
                if (quad >= step) before += left;
            }
            if (quad == 3) {  // holds the row's total
                const int totals[2] = {before & 0xFFFF, before >> 16};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (totals[h]) base[h] = atomicAdd(filter.count + row + 8 * h, totals[h]);
                }
            }
            before -= packed;
        }

        // Asks only now what the atomics answered.
        __device__ __forceinline__ void finish() {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                int at = __shfl_sync(0xFFFFFFFFu, base[h], lane | 3) + (h ? before >> 16 : before & 0xFFFF);
                int* const list = filter.index + static_cast<int64_t>(kept_row + 8 * h) * filter.capacity;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    for (uint32_t left = kept[h][half]; left; left &= left - 1, ++at) {
                        const int bit = __ffs(static_cast<int>(left)) - 1;
                        if (at < filter.capacity) list[at] = first + half * 128 + bit / 2 * 8 + bit % 2;
                    }
                }
            }
            __syncwarp();
        }
    };
};

// Store the largest of every GROUP scores of a row. Which features share a maximum does not matter to who asks for the
// rank-th largest maximum, so they are those one thread holds, and a row's are [tile, GROUP / 2 blocks of 8, quad].
template <int GROUP>
struct Maxima {
    const float* bias;  // may be null
    int64_t stride;     // of the sampled features, in features
    float* maxima;      // [rows, groups]
    int64_t groups;     // 256 / GROUP a tile

    __device__ __forceinline__ void stage(Features& to, int pair, int feature, int features) const {
        float biases[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            biases[e] = feature + e >= features ? -INFINITY : bias ? __ldg(bias + (feature + e) * stride) : 0.0f;
        }
        to.bias_norm[pair] = make_float4(biases[0], biases[1], 0.0f, 0.0f);
    }

    struct Thread {
        const Maxima& sample;
        const int lane;
        int row = 0;

        __device__ __forceinline__ Thread(const Maxima& sample, int lane) : sample(sample), lane(lane) {}
        __device__ __forceinline__ void begin(int at, int) { row = at; }
        __device__ __forceinline__ void finish() {}

        __device__ __forceinline__ void take(const float (&scores)[128], const Features& features, Tile tile,
                                             const Work& work) {
            constexpr int kBlocks = GROUP == 1 ? 1 : GROUP / 2;  // of 8 features, of which the thread holds two
            const int quad = lane % 4;
            float* to = sample.maxima + row * sample.groups + tile.feature / GROUP;
#pragma unroll
            for (int j = 0; j < 32; j += kBlocks) {
                float best[2][2];
#pragma unroll
                for (int block = 0; block < kBlocks; ++block) {
                    const float4 bias = features.bias_norm[4 * (j + block) + quad];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float score = scores[4 * (j + block) + i] + (i % 2 ? bias.y : bias.x);
                        best[i / 2][i % 2] = block ? fmaxf(best[i / 2][i % 2], score) : score;
                    }
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (row + 8 * h >= work.rows) continue;
                    float* const at = to + 8 * h * sample.groups;
                    if (GROUP == 1) {
                        at[8 * j + 2 * quad] = best[h][0];
                        at[8 * j + 2 * quad + 1] = best[h][1];
                    } else {
                        at[j / kBlocks * 4 + quad] = fmaxf(best[h][0], best[h][1]);
                    }
                }
            }
        }
    };
};

}  // namespace microtome::cuda::encode
