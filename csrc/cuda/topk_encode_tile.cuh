// Scores of bf16 rows x [n, d] against features W [f, d], tile by tile in registers, for an epilogue that stores
// little.
//
// A block of three warpgroups stays on its multiprocessor and takes tiles of 128 rows x 256 features in turn. Of the
// first, one thread copies 64 columns of both at a time into a ring of four stages, and one warp brings what the
// epilogue needs of each feature. The other two multiply 64 rows each: 128 accumulators a thread, one product in flight
// while the next stage is waited for. A larger tile would not fit the registers, a smaller one asks more of L2: at
// 128 x 256 a multiprocessor reads 48 bytes a cycle at the tensor cores' full rate, at 64 x 256, a tile for each
// warpgroup, 80.
//
// The second warpgroup starts kLead stages late and stays as late, so that while one is in its epilogue the other has
// stages left to multiply, at twice its share of the tensor cores. What an epilogue need not do before the accumulators
// are used again it does under the next tile's first product.
#pragma once

#include "cuda/hopper.cuh"

namespace microtome::cuda::encode {

constexpr int kRows = 128, kFeatures = 256, kDepth = 64, kStages = 4, kLead = 2;
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
// 384 threads start with 168 registers each: 40 + 2 * 232 = 3 * 168.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
// Blocks that run at the same time take tiles of 16 row tiles and a few feature tiles, which then come from L2.
constexpr int kRowTiles = 16;

struct Stage {
    uint16_t x[kRows * kDepth], w[kFeatures * kDepth];
};

// What an epilogue needs of a tile's features 2 i and 2 i + 1: two at a time, as a thread holds them.
struct Features {
    float4 bias_norm[kFeatures / 2];  // both biases, both norms
    float2 lost[kFeatures / 2];
};

struct Shared {
    Stage stages[kStages];
    Features features[2];
    uint64_t full[kStages], empty[kStages], features_full[2], features_empty[2];
};
static_assert(sizeof(Stage) % 1024 == 0 && sizeof(Shared) <= 227 << 10);

struct Work {
    int rows, features, chunks;  // chunks of kDepth columns
    int row_tiles, feature_tiles;
    __host__ __device__ int tiles() const { return row_tiles * feature_tiles; }
};

struct Tile {
    int row, feature;  // its first
};

__device__ __forceinline__ Tile tile_at(const Work& work, int i) {
    const int band = kRowTiles * work.feature_tiles, first = i / band * kRowTiles;
    const int height = min(kRowTiles, work.row_tiles - first), within = i % band;
    return {(first + within % height) * kRows, within / height * kFeatures};
}

// A place in a ring of stages, and the parity of its turn.
template <int STAGES>
struct Place {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        parity ^= slot == 0;
    }
};

__device__ __forceinline__ void copy_tiles(Shared& shared, const hopper::TensorMap& x, const hopper::TensorMap& w,
                                           const Work& work) {
    Place<kStages> at;
    for (int i = blockIdx.x; i < work.tiles(); i += gridDim.x) {
        const Tile tile = tile_at(work, i);
        for (int chunk = 0; chunk < work.chunks; ++chunk, at.next()) {
            Stage& stage = shared.stages[at.slot];
            uint64_t* const full = &shared.full[at.slot];
            hopper::mbarrier_wait(&shared.empty[at.slot], at.parity ^ 1);
            hopper::mbarrier_arrive_expect_tx(full, sizeof(Stage));
            hopper::tensor_copy(stage.x, x, chunk * kDepth, tile.row, full);
            hopper::tensor_copy(stage.w, w, chunk * kDepth, tile.feature, full);
        }
    }
}

template <class Epilogue>
__device__ __forceinline__ void stage_features(Shared& shared, const Work& work, const Epilogue& epilogue) {
    Place<2> at;
    for (int i = blockIdx.x; i < work.tiles(); i += gridDim.x, at.next()) {
        hopper::mbarrier_wait(&shared.features_empty[at.slot], at.parity ^ 1);
        const int first = tile_at(work, i).feature;
        for (int pair = threadIdx.x % 32; pair < kFeatures / 2; pair += 32) {
            epilogue.stage(shared.features[at.slot], pair, first + 2 * pair, work.features);
        }
        hopper::mbarrier_arrive(&shared.features_full[at.slot]);
    }
}

// Of a product, thread 4 r + q of a warp holds rows r and r + 8, and of every 8 features those at 2 q and 2 q + 1:
// register 4 j + 2 h + e is row r + 8 h, feature 8 j + 2 q + e.
template <class Epilogue>
__device__ __forceinline__ void multiply_tiles(Shared& shared, const Work& work, const Epilogue& epilogue) {
    const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0);
    const int lane = threadIdx.x % 32;
    const int row = group * 64 + threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
    const uint32_t x = hopper::shared_address(shared.stages[0].x) + group * 64 * kDepth * 2;
    const uint32_t w = hopper::shared_address(shared.stages[0].w);
    const int turns = (work.tiles() - static_cast<int>(blockIdx.x) - 1) / static_cast<int>(gridDim.x) + 1;
    int lead = min(kLead, turns * work.chunks);
    if (group == 1) hopper::named_barrier(1, 2 * kWarpgroup);

    float scores[128];
    typename Epilogue::Thread mine(epilogue, lane);
    Place<kStages> at;
    Place<2> of_features;
    for (int i = blockIdx.x; i < work.tiles(); i += gridDim.x, of_features.next()) {
        const Tile tile = tile_at(work, i);
        mine.begin(tile.row + row, work.rows);
        int last = 0;
        for (int chunk = 0; chunk < work.chunks; ++chunk) {
            const uint32_t offset = at.slot * static_cast<uint32_t>(sizeof(Stage));
            const uint64_t a = hopper::descriptor(x + offset), b = hopper::descriptor(w + offset);
            hopper::mbarrier_wait(&shared.full[at.slot], at.parity);
            hopper::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {
                hopper::wgmma(scores, a + k * hopper::kNextColumns, b + k * hopper::kNextColumns, k > 0 || chunk > 0);
            }
            hopper::wgmma_commit_group();
            if (chunk == 0) {
                mine.finish();
            } else {
                hopper::wgmma_wait_group<1>();
                if (lane == 0) hopper::mbarrier_arrive(&shared.empty[last]);
            }
            if (group == 0 && --lead == 0) hopper::named_barrier_arrive(1, 2 * kWarpgroup);
            last = at.slot;
            at.next();
        }
        hopper::wgmma_wait_group<0>();
        hopper::hold(scores);
        if (lane == 0) hopper::mbarrier_arrive(&shared.empty[last]);
        hopper::mbarrier_wait(&shared.features_full[of_features.slot], of_features.parity);
        mine.take(scores, shared.features[of_features.slot], tile, work);
        __syncwarp();
        if (lane == 0) hopper::mbarrier_arrive(&shared.features_empty[of_features.slot]);
    }
    mine.finish();
}

template <class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    encode_kernel(const __grid_constant__ hopper::TensorMap x, const __grid_constant__ hopper::TensorMap w,
                  const Work work, const Epilogue epilogue) {
#if MICROTOME_SM90A
    MICROTOME_DYNAMIC_SHARED(Shared, shared);
    if (threadIdx.x == 0) {
        hopper::prefetch(x);
        hopper::prefetch(w);
        for (int i = 0; i < kStages; ++i) {
            hopper::mbarrier_init(&shared->full[i], 1);
            hopper::mbarrier_init(&shared->empty[i], 2 * kWarpgroup / 32);  // a warp each
        }
        for (int i = 0; i < 2; ++i) {
            hopper::mbarrier_init(&shared->features_full[i], 32);
            hopper::mbarrier_init(&shared->features_empty[i], 2 * kWarpgroup / 32);
        }
        hopper::fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        hopper::give_registers<kProducerRegisters>();
        const int warp = threadIdx.x / 32;
        if (warp == 0 && hopper::elect_one()) copy_tiles(*shared, x, w, work);
        if (warp == 1) stage_features(*shared, work, epilogue);
    } else {
        hopper::take_registers<kConsumerRegisters>();
        multiply_tiles(*shared, work, epilogue);
    }
#endif
}

}  // namespace microtome::cuda::encode
