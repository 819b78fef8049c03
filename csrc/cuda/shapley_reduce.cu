// A block per explicand, stratum and 128 units: walks are copied to shared memory once, where every player gathers its
// own numbers, while the next walks are on their way.
#include <algorithm>

#include "cuda/copy.cuh"
#include "cuda/device.cuh"
#include "cuda/shapley_reduce.h"

namespace microtome::cuda {
namespace {

template <class T>
struct Walks {
    const T* values;       // [e, S, U, A, L, o]
    const int32_t* ranks;  // [S, U, A, p]
    int64_t S, U, A, p, o, points;
    bool paired;
};

// What a block takes of a walk: so many players and outputs; and how many walks a buffer holds.
struct Tile {
    int players, outputs;
    int across;  // tiles of outputs; tiles of players come after them
    int walks;   // of a buffer
    int room;    // elements of a buffer
    int64_t chunks;
    unsigned first;  // tile of this launch
};

constexpr int64_t kBuffer = 16 << 10, kMostShared = 220 << 10;  // bytes: of a buffer where a walk is shorter; of both

// Start copying walks [first, first + count) to a buffer: outputs [output, output + tile.outputs) of each point.
// Returns how far into the buffer the first one begins, because 16 bytes are copied at a time where the walks follow
// each other in memory.
template <class T>
__device__ int fetch(const Walks<T>& w, int64_t first, int count, int output, int outputs, T* buffer) {
    constexpr int kAt = 16 / sizeof(T);
    const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int64_t length = w.points * w.o;
    const T* const from = w.values + first * length;
    if (outputs == w.o) {
        const int before = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
        const int size = before + static_cast<int>(count * length), whole = size / kAt * kAt;
        for (int i = kAt * me; i < whole; i += kAt * threads) copy_async<16>(buffer + i, from - before + i);
        for (int i = whole + me; i < size; i += threads) copy_async<sizeof(T)>(buffer + i, from - before + i);
        commit_async();
        return before;
    }
    const int size = static_cast<int>(count * w.points) * outputs;
    for (int i = me; i < size; i += threads) {
        copy_async<sizeof(T)>(buffer + i, from + static_cast<int64_t>(i / outputs) * w.o + output + i % outputs);
    }
    commit_async();
    return 0;
}

// T, the sum, and S, the squares about the mean, of one more unit x, the n-th; scale = 1 / (n (n - 1)).
__device__ void take(double& sum, double& squares, double x, double n, double scale) {
    sum += x;
    const double apart = n * x - sum;
    squares += apart * apart * scale;
}

template <class T, int kItems, bool kStaged>
__global__ void __launch_bounds__(kItems == 1 ? 256 : 512)
    reduce_kernel(Walks<T> w, Tile tile, double* sums, double* squares) {
    MICROTOME_DYNAMIC_SHARED(T, buffers);
    MICROTOME_SHARED(double, scales, kUnits);
    const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int64_t row = blockIdx.x / tile.chunks, chunk = blockIdx.x % tile.chunks;
    const int among = static_cast<int>(tile.first + blockIdx.y);
    const int first_output = among % tile.across * tile.outputs;
    const int first_player = among / tile.across * tile.players;
    const int outputs = static_cast<int>(w.o - first_output < tile.outputs ? w.o - first_output : tile.outputs);
    const int players = static_cast<int>(w.p - first_player < tile.players ? w.p - first_player : tile.players);
    const int64_t unit = chunk * kUnits;
    const int units = static_cast<int>(w.U - unit < kUnits ? w.U - unit : kUnits);
    const int walks = units * static_cast<int>(w.A);
    const int64_t walk = (row * w.U + unit) * w.A;
    const int32_t* const ranks = w.ranks + (row % w.S * w.U + unit) * w.A * w.p + first_player;
    for (int i = me; i < kUnits; i += threads) scales[i] = i == 0 ? 0.0 : 1.0 / (static_cast<double>(i) * (i + 1));

    int player[kItems], output[kItems], rank[kItems];
    double total[kItems], sum[kItems], square[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
        const int item = k * threads + me;
        player[k] = item < players * outputs ? item / outputs : -1;
        output[k] = item % outputs;
        rank[k] = player[k] >= 0 ? ranks[player[k]] : 0;
        total[k] = sum[k] = square[k] = 0.0;
    }
    const int64_t far = w.p * (kStaged ? outputs : w.o), next = kStaged ? outputs : w.o;
    int shift[2] = {0, 0};
    if (kStaged) shift[0] = fetch(w, walk, min(tile.walks, walks), first_output, outputs, buffers);
    int order = 0, n = 0;
    for (int first = 0, side = 0; first < walks; first += tile.walks, side ^= 1) {
        const int count = min(tile.walks, walks - first);
        if (kStaged) {
            if (first + count < walks) {
                const int coming = min(tile.walks, walks - first - count);
                T* const buffer = buffers + (side ^ 1) * tile.room;
                const int begins = fetch(w, walk + first + count, coming, first_output, outputs, buffer);
                shift[0] = side ? begins : shift[0];
                shift[1] = side ? shift[1] : begins;
                wait_async<1>();
            } else {
                wait_async<0>();
            }
        }
        __syncthreads();
        const T* at = kStaged ? buffers + side * tile.room + (side ? shift[1] : shift[0])
                              : w.values + (walk + first) * w.points * w.o + first_output;
        for (int i = 0; i < count; ++i, at += w.points * next) {
            const bool ends = ++order == w.A;
            n += ends;
            const double scale = scales[max(n - 1, 0)];
            const int32_t* const then = ranks + static_cast<int64_t>(min(first + i + 1, walks - 1)) * w.p;
#pragma unroll
            for (int k = 0; k < kItems; ++k) {
                if (player[k] < 0) continue;
                const T* const v = at + rank[k] * next + output[k];
                rank[k] = then[player[k]];
                double step = static_cast<double>(v[next]) - static_cast<double>(v[0]);
                if (w.paired) {
                    step = (step + (static_cast<double>(v[far]) - static_cast<double>(v[far + next]))) * 0.5;
                }
                total[k] += step;
                if (ends) {
                    take(sum[k], square[k], w.A == 1 ? total[k] : total[k] / static_cast<double>(w.A), n, scale);
                    total[k] = 0.0;
                }
            }
            if (ends) order = 0;
        }
        __syncthreads();  // before the buffer is written again
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
        if (player[k] < 0) continue;
        const int64_t item = (blockIdx.x * w.p + first_player + player[k]) * w.o + first_output + output[k];
        sums[item] = tile.chunks == 1 ? sum[k] / static_cast<double>(w.U) : sum[k];
        squares[item] = square[k];
    }
}

// Of the blocks of 128 units, in their order.
__global__ void __launch_bounds__(256)
    combine_kernel(const double* sums, const double* squares, int64_t items, int64_t wide, int64_t chunks, int64_t U,
                   double* mean, double* m2) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= items) return;
    const int64_t first = item / wide * chunks * wide + item % wide;
    double sum = sums[first], square = squares[first], n = static_cast<double>(kUnits);
    for (int64_t c = 1; c < chunks; ++c) {
        const int64_t at = first + c * wide;
        const double more = static_cast<double>(U - c * kUnits < kUnits ? U - c * kUnits : kUnits);
        const double apart = sums[at] / more - sum / n;
        square += squares[at] + apart * apart * (n * more / (n + more));
        sum += sums[at];
        n += more;
    }
    mean[item] = sum / n;
    m2[item] = square;
}

constexpr int64_t kMost = 4096, kMostUnstaged = 2048;  // players times outputs of a block

template <class T, int kItems, bool kStaged>
void reduce(const Walks<T>& walks, Tile tile, int64_t rows, double* sums, double* squares, uintptr_t stream) {
    const auto size = static_cast<int64_t>(sizeof(T));
    const int64_t length = walks.points * tile.outputs, at_once = 16 / size;
    const int64_t fit = kStaged ? std::max<int64_t>(kBuffer / (length * size), 1) : 1;
    tile.walks = static_cast<int>(std::min(fit, std::min(walks.U, kUnits) * walks.A));
    tile.room = static_cast<int>((tile.walks * length + 2 * at_once - 1) / at_once * at_once);
    const int64_t tiles = tile.across * ((walks.p + tile.players - 1) / tile.players);
    const int64_t each = static_cast<int64_t>(tile.players) * tile.outputs;
    const int64_t threads = ((each + kItems - 1) / kItems + 31) / 32 * 32;
    // Along x, with rows and chunks, the tiles' number would cost registers and spill.
    for (const auto& [first, count] : slabs(tiles)) {
        tile.first = first;
        const Geometry geometry{dim3(static_cast<unsigned>(rows * tile.chunks), count),
                                dim3(static_cast<unsigned>(threads)),
                                kStaged ? static_cast<size_t>(2 * tile.room) * sizeof(T) : 0, stream};
        launch("shapley_reduce", reduce_kernel<T, kItems, kStaged>, geometry, walks, tile, sums, squares);
    }
}

template <class T>
void run(uintptr_t values, uintptr_t ranks, int64_t e, int64_t S, int64_t U, int64_t A, int64_t p, int64_t o,
         bool paired, uintptr_t mean, uintptr_t m2, uintptr_t parts, uintptr_t stream) {
    const Walks<T> walks{
        at<const T>(values), at<const int32_t>(ranks), S, U, A, p, o, paired ? 2 * p + 1 : p + 1, paired};
    const int64_t rows = e * S, wide = p * o, chunks = (U + kUnits - 1) / kUnits;
    if (rows * wide == 0) return;
    Tile tile{};
    // Elements of a walk that fit one of two buffers beside `scales`; 16 bytes more at either end, to copy as many.
    const int64_t shared = std::min(kMostShared, most_shared() - 1024);
    const int64_t room = (shared / 2 - 32) / static_cast<int64_t>(sizeof(T));
    tile.outputs = static_cast<int>(std::max<int64_t>(std::min({o, kMost / p, room / walks.points}), 1));
    const bool staged = walks.points * tile.outputs <= room;
    tile.players = static_cast<int>(std::min(p, staged ? kMost : kMostUnstaged / tile.outputs));
    tile.across = static_cast<int>((o + tile.outputs - 1) / tile.outputs);
    tile.chunks = chunks;
    double* const sums = at<double>(chunks == 1 ? mean : parts);
    double* const squares = chunks == 1 ? at<double>(m2) : sums + rows * chunks * wide;
    const int each = tile.players * tile.outputs;
    (!staged        ? reduce<T, 4, false>
     : each <= 256  ? reduce<T, 1, true>
     : each <= 2048 ? reduce<T, 4, true>
                    : reduce<T, 8, true>)(walks, tile, rows, sums, squares, stream);
    if (chunks > 1) {
        launch("shapley_reduce: combine", combine_kernel, one_thread_each(rows * wide, stream), sums, squares,
               rows * wide, wide, chunks, U, at<double>(mean), at<double>(m2));
    }
}

}  // namespace

void shapley_reduce(bool wide, uintptr_t values, uintptr_t ranks, int64_t e, int64_t S, int64_t U, int64_t A, int64_t p,
                    int64_t o, bool paired, uintptr_t mean, uintptr_t m2, uintptr_t parts, uintptr_t stream) {
    (wide ? run<double> : run<float>)(values, ranks, e, S, U, A, p, o, paired, mean, m2, parts, stream);
}

}  // namespace microtome::cuda
