// A thread writes 16 bytes of one row after another, and keeps the ranks of its columns while rows share an order.
#include <algorithm>

#include "cuda/coalition_inputs.h"
#include "cuda/device.cuh"
#include "cuda/numbers.cuh"

namespace microtome::cuda {
namespace {

constexpr int kRows = 16;  // of a block

// kItems items of T at once: 16 bytes, or one item where rows do not start at multiples of 16 bytes.
template <class T, int kItems>
struct alignas(kItems * sizeof(T)) Pack {
    T item[kItems];
};

struct Tables {
    const int32_t *ranks, *rows, *player;
    int64_t m, p, R;
};

template <class T, int kItems>
__global__ void __launch_bounds__(256)
    inputs_kernel(Tables t, const T* __restrict__ x, const T* __restrict__ background, T* __restrict__ out) {
    using Items = Pack<T, kItems>;
    const Place place = place_in(blockIdx.x, (t.R + kRows - 1) / kRows);
    const int64_t column = (static_cast<int64_t>(place.across) * blockDim.x + threadIdx.x) * kItems;
    if (column >= t.m) return;
    int32_t player[kItems], rank[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        player[i] = t.player != nullptr ? t.player[column + i] : static_cast<int32_t>(column) + i;
        rank[i] = 0;
    }
    int32_t known = -1;  // the order whose ranks these are
    const int64_t first = static_cast<int64_t>(place.row) * kRows;
    const int64_t last = first + kRows < t.R ? first + kRows : t.R;
    for (int64_t row = first; row < last; ++row) {
        const int32_t* const entry = t.rows + row * 5;
        const int32_t order = entry[2], lo = entry[3], hi = entry[4];
        const Items there = *reinterpret_cast<const Items*>(x + entry[0] * t.m + column);
        Items made = *reinterpret_cast<const Items*>(background + entry[1] * t.m + column);
        if (order != known) {
            known = order;
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                if (player[i] >= 0) rank[i] = t.ranks[order * t.p + player[i]];
            }
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (player[i] < 0 || (rank[i] >= lo && rank[i] < hi)) made.item[i] = there.item[i];
        }
        *reinterpret_cast<Items*>(out + row * t.m + column) = made;
    }
}

template <class T, int kItems>
void run(const Tables& t, uintptr_t x, uintptr_t background, uintptr_t out, uintptr_t stream) {
    const int64_t across = (t.m + kItems - 1) / kItems, threads = std::min<int64_t>((across + 31) / 32 * 32, 256);
    const Geometry geometry{along_x("coalition_inputs", (t.R + kRows - 1) / kRows, (across + threads - 1) / threads),
                            dim3(static_cast<unsigned>(threads)), 0, stream};
    launch("coalition_inputs", inputs_kernel<T, kItems>, geometry, t, at<const T>(x), at<const T>(background),
           at<T>(out));
}

template <class T>
void choose(const Tables& t, uintptr_t x, uintptr_t background, uintptr_t out, uintptr_t stream) {
    constexpr int kItems = 16 / sizeof(T);
    bool whole = true;
    for (uintptr_t rows : {x, background, out}) {
        whole = whole && in_sixteens(rows, t.m * static_cast<int64_t>(sizeof(T)));
    }
    (whole ? run<T, kItems> : run<T, 1>)(t, x, background, out, stream);
}

}  // namespace

void coalition_inputs(int64_t item, uintptr_t x, uintptr_t background, uintptr_t ranks, uintptr_t rows,
                      uintptr_t player, int64_t m, int64_t p, int64_t R, uintptr_t out, uintptr_t stream) {
    if (m == 0 || R == 0) return;
    const Tables tables{at<const int32_t>(ranks), at<const int32_t>(rows), at<const int32_t>(player), m, p, R};
    (item == 1   ? choose<uint8_t>
     : item == 2 ? choose<uint16_t>
     : item == 4 ? choose<uint32_t>
                 : choose<uint64_t>)(tables, x, background, out, stream);
}

}  // namespace microtome::cuda
