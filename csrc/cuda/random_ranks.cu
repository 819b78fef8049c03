// Keys are sorted in shared memory, several orders a block where players are few.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/numbers.cuh"
#include "cuda/random_ranks.h"

namespace microtome::cuda {
namespace {

constexpr int kBits = 12;  // of a key that hold the player
constexpr uint64_t kPlayer = (1u << kBits) - 1;
constexpr int kTogether = 1024;  // keys of a block, where an order has fewer

// Salmon et al. 2011, doi:10.1145/2063384.2063405.
__device__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

// Ascending within runs of `size` keys; both are powers of two. Pairs that lie within 64 keys stay within a warp.
__device__ void sort_runs(uint64_t* keys, int all, int size) {
    const int threads = static_cast<int>(blockDim.x);
    for (int run = 2; run <= size; run *= 2) {
        for (int apart = run / 2; apart > 0; apart /= 2) {
            for (int t = static_cast<int>(threadIdx.x); t < all / 2; t += threads) {
                const int low = (t & ~(apart - 1)) << 1 | (t & (apart - 1));
                const uint64_t a = keys[low], b = keys[low + apart];
                if ((a > b) == ((low & run) == 0 || run == size)) {
                    keys[low] = b;
                    keys[low + apart] = a;
                }
            }
            const int next = apart > 1 ? apart / 2 : run;
            if ((apart > next ? apart : next) > 32) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
}

__global__ void __launch_bounds__(512)
    ranks_kernel(const int64_t* samples, int32_t* ranks, int64_t n, int p, int size, int orders, uint2 seed) {
    MICROTOME_DYNAMIC_SHARED(uint64_t, keys);  // [orders, size], then as many places of 16 bits
    const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), all = orders * size;
    auto* const places = reinterpret_cast<uint16_t*>(keys + all);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * orders;
    for (int i = 2 * me; i < all; i += 2 * threads) {
        const int order = i / size, player = i % size;
        if (first + order >= n || player >= p) {
            keys[i] = keys[i + 1] = ~uint64_t{0};
            continue;
        }
        const auto sample = static_cast<uint64_t>(samples[first + order]);
        const uint4 words = philox(make_uint4(static_cast<unsigned>(player) / 2, 0, static_cast<uint32_t>(sample),
                                              static_cast<uint32_t>(sample >> 32)),
                                   seed);
        const uint64_t even = static_cast<uint64_t>(words.y) << 32 | words.x;
        const uint64_t odd = static_cast<uint64_t>(words.w) << 32 | words.z;
        keys[i] = (even & ~kPlayer) | static_cast<uint64_t>(player);
        keys[i + 1] = player + 1 < p ? (odd & ~kPlayer) | static_cast<uint64_t>(player + 1) : ~uint64_t{0};
    }
    __syncthreads();
    sort_runs(keys, all, size);
    __syncthreads();
    for (int i = me; i < all; i += threads) {
        const int place = i % size;
        if (place < p && first + i / size < n)
            places[i - place + static_cast<int>(keys[i] & kPlayer)] = static_cast<uint16_t>(place);
    }
    __syncthreads();
    const int64_t left = n - first;
    const int wanted = static_cast<int>(left < orders ? left : orders) * p;
    for (int i = me; i < wanted; i += threads) ranks[first * p + i] = places[i / p * size + i % p];
}

}  // namespace

void random_ranks(uintptr_t samples, uintptr_t ranks, int64_t n, int64_t p, uint64_t seed, uintptr_t stream) {
    if (p > kMostPlayers) throw std::runtime_error("random_ranks: an order does not fit shared memory");
    if (p == 0) return;
    const int64_t size = std::max<int64_t>(up_to_power(p), 2), orders = std::max<int64_t>(kTogether / size, 1);
    const unsigned threads = size * orders > 1024 ? 512 : 256;
    const Geometry geometry{dim3(static_cast<unsigned>((n + orders - 1) / orders)), dim3(threads),
                            static_cast<size_t>(size * orders) * (sizeof(uint64_t) + sizeof(uint16_t)), stream};
    launch("random_ranks", ranks_kernel, geometry, at<const int64_t>(samples), at<int32_t>(ranks), n, p, size, orders,
           make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)));
}

}  // namespace microtome::cuda
