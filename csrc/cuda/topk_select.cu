// A block per row, its answer that of kernels/topk_select.py. Keys of 64 bits, the k-th found digit by digit, the k
// winners sorted in shared memory.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/numbers.cuh"
#include "cuda/topk_select.h"

namespace microtome::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int64_t kKept = 8192;  // the largest capacity whose keys stay in shared memory

struct Candidates {
    const float* theta;    // [n]
    const int32_t* count;  // [n]
    const int32_t* index;  // [n, capacity]
    const float* value;
    int32_t *failed, *failures;
    int64_t capacity;
};

// Orders by value, then by the lower index; the last bit tells -0.0 from 0.0, which differ in nothing else.
__device__ uint64_t key_of(float value, int32_t index) {
    const uint32_t low = (0x7FFFFFFFu - static_cast<uint32_t>(index)) << 1;
    return static_cast<uint64_t>(ordered(value)) << 32 | low | (__float_as_uint(value) == 0x80000000u);
}
__device__ int32_t index_of(uint64_t key) {
    return static_cast<int32_t>(0x7FFFFFFFu - (static_cast<uint32_t>(key) >> 1));
}
__device__ float value_of(uint64_t key) {
    const float value = unordered(static_cast<uint32_t>(key >> 32));
    return value == 0.0f && (key & 1) ? -0.0f : value;
}

// Descending. A pass over pairs that lie within 64 places stays within a warp and needs no barrier of the block.
__device__ void sort_keys(uint64_t* keys, int size) {
    for (int run = 2; run <= size; run *= 2) {
        for (int apart = run / 2; apart > 0; apart /= 2) {
            for (int t = static_cast<int>(threadIdx.x); t < size / 2; t += static_cast<int>(blockDim.x)) {
                const int low = (t & ~(apart - 1)) << 1 | (t & (apart - 1));
                const uint64_t a = keys[low], b = keys[low + apart];
                if ((a < b) == ((low & run) == 0)) {
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

// What a pass over one digit found: the digit of the k-th, how many of its keys are still wanted, how many it has.
struct Digit {
    int value, wanted, has;
};

// The digit at which the keys from the largest down reach `wanted`; by the first warp, 8 digits a lane.
__device__ void find_digit(const int* histogram, int wanted, Digit* out) {
    const int lane = static_cast<int>(threadIdx.x), top = 255 - 8 * lane;
    int mine = 0;
    for (int i = 0; i < 8; ++i) mine += histogram[top - i];
    int through = mine;
    for (int delta = 1; delta < 32; delta *= 2) {
        const int before = __shfl_up_sync(kAll, through, static_cast<unsigned>(delta));
        if (lane >= delta) through += before;
    }
    int left = wanted - (through - mine);
    if (left <= 0 || left > mine) return;
    int digit = top;
    for (; histogram[digit] < left; --digit) left -= histogram[digit];
    *out = {digit, left, histogram[digit]};
}

struct Row {
    const float* value;
    const int32_t* index;
    uint64_t* kept;  // keys in shared memory, or null
    int listed;

    __device__ uint64_t key(int i) const { return kept != nullptr ? kept[i] : key_of(value[i], index[i]); }
};

// Write the k best of more than k keys to `best`, in no order.
__device__ void pick(const Row& row, int k, uint64_t* best, int* histogram) {
    MICROTOME_SHARED(Digit, digit, 1);
    MICROTOME_SHARED(int, taken, 1);
    const int threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x);
    uint64_t prefix = 0, mask = 0;
    int wanted = k;
    if (me == 0) *taken = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = me; i < 256; i += threads) histogram[i] = 0;
        __syncthreads();
        for (int i = me; i < row.listed; i += threads) {
            const uint64_t key = row.key(i);
            if ((key & mask) == prefix) atomicAdd(&histogram[key >> shift & 255], 1);
        }
        __syncthreads();
        if (me < 32) find_digit(histogram, wanted, digit);
        __syncthreads();
        prefix |= static_cast<uint64_t>(digit->value) << shift;
        mask |= uint64_t{255} << shift;
        wanted = digit->wanted;
        if (digit->has == wanted) break;
    }
    const unsigned lane = threadIdx.x % 32;
    for (int first = 0; first < row.listed; first += threads) {
        const int i = first + me;
        const uint64_t key = i < row.listed ? row.key(i) : 0;
        const bool wins = i < row.listed && (key & mask) >= prefix;
        const unsigned winners = __ballot_sync(kAll, wins);
        int at = 0;
        if (lane == 0) at = atomicAdd(taken, __popc(winners));
        at = __shfl_sync(kAll, at, 0) + __popc(winners & ((1u << lane) - 1));
        if (wins && at < k) best[at] = key;
    }
}

template <class T>
__global__ void __launch_bounds__(512)
    select_kernel(Candidates c, T* values, int32_t* indices, int32_t* candidates, int k, int f, int room, bool listed) {
    MICROTOME_DYNAMIC_SHARED(uint64_t, best);  // [room], then the row's keys
    MICROTOME_SHARED(int, histogram, 256);
    int64_t place = blockIdx.x;
    if (listed) {
        if (place >= *c.failures) return;
        place = c.failed[place];
    }
    const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int passed = c.count[place];
    const int m = static_cast<int>(passed <= c.capacity ? passed : 0);  // a list that overflowed has no values
    MICROTOME_SHARED(int, tally, 2);                                    // values above -inf, NaN or inf
    if (me < 2) tally[me] = 0;
    __syncthreads();
    int computed = 0, wrong = me == 0 && !(c.theta[place] == c.theta[place]);
    for (int i = me; i < m; i += threads) {
        const float value = c.value[place * c.capacity + i];
        computed += value > __uint_as_float(0xFF800000u);
        wrong |= !(value < __uint_as_float(0x7F800000u));
    }
    if (computed > 0) atomicAdd(&tally[0], computed);
    if (wrong) atomicAdd(&tally[1], 1);
    Row row{c.value + place * c.capacity, c.index + place * c.capacity, nullptr, m};
    int size = 1;
    if (m <= room) {
        while (size < m) size *= 2;
        for (int i = me; i < m; i += threads) best[i] = row.key(i);
        for (int i = m + me; i < size; i += threads) best[i] = 0;
    } else {
        while (size < k) size *= 2;
        if (c.capacity <= kKept) {
            uint64_t* const kept = best + room;
            for (int i = me; i < m; i += threads) kept[i] = row.key(i);
            row.kept = kept;
        }
        pick(row, k, best, histogram);
        for (int i = k + me; i < size; i += threads) best[i] = 0;
    }
    __syncthreads();
    sort_keys(best, size);
    __syncthreads();
    const bool bad = tally[1] > 0;
    for (int i = me; i < k; i += threads) {
        const int64_t at = place * k + i;
        const float value = i < m ? value_of(best[i]) : __uint_as_float(0xFF800000u);
        values[at] = narrow<T>(bad ? __uint_as_float(0x7FC00000u) : value);
        indices[at] = bad ? i : i < m ? index_of(best[i]) : -1;
    }
    if (me == 0) {
        candidates[place] = listed || bad ? f : tally[0];
        if (!listed && !bad && (m < k || !(value_of(best[k - 1]) >= c.theta[place]) || passed > c.capacity)) {
            c.failed[atomicAdd(c.failures, 1)] = static_cast<int32_t>(place);
        }
    }
}

template <class T>
struct Weights {
    const T *x, *W, *bias, *center;
    int64_t d;
};

constexpr int kWarps = 8, kRows = 4;       // of a block; weight rows that a warp reads at once
constexpr int kPart = 4 * kWarps * kRows;  // candidates of a block

// kAt elements of T at a time: 16 bytes, or 1 where rows do not start at a multiple of 16 bytes.
template <class T, int kAt>
__device__ void load(const T* at, float (&out)[kAt]) {
    if constexpr (kAt > 1) {
        unpack(__ldg(reinterpret_cast<const uint4*>(at)), out);
    } else {
        out[0] = widen(__ldg(at));
    }
}

template <class T, int kAt>
__global__ void __launch_bounds__(32 * kWarps) value_kernel(Weights<T> w, const int32_t* count, int32_t* index,
                                                            float* value, int64_t n, int64_t capacity, bool all) {
    MICROTOME_DYNAMIC_SHARED(float, centred);  // [d]
    const Place place = place_in(blockIdx.x, n);
    const int64_t row = place.row, first = static_cast<int64_t>(place.across) * kPart;
    const int64_t listed = count[row] < capacity ? count[row] : capacity;
    if (first >= listed) return;
    for (int64_t i = threadIdx.x; i < w.d; i += blockDim.x) {
        const float c = w.center != nullptr ? widen(w.center[i]) : 0.0f;
        centred[i] = widen(w.x[row * w.d + i]) - c;
    }
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int64_t last = listed < first + kPart ? listed : first + kPart;
    for (int64_t base = first + kRows * warp; base < last; base += kRows * kWarps) {
        const T* weights[kRows];
        float sum[kRows] = {};
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t at = base + r < last ? base + r : base;
            weights[r] = w.W + (all ? at : static_cast<int64_t>(index[row * capacity + at])) * w.d;
        }
#pragma unroll 2
        for (int64_t i = kAt * lane; i < w.d; i += 32 * kAt) {
            float part[kRows][kAt];
#pragma unroll
            for (int r = 0; r < kRows; ++r) load<T, kAt>(weights[r] + i, part[r]);
#pragma unroll
            for (int c = 0; c < kAt; ++c) {
                const float x = centred[i + c];
#pragma unroll
                for (int r = 0; r < kRows; ++r) sum[r] = __fmaf_rn(part[r][c], x, sum[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int flip = 16; flip > 0; flip /= 2) sum[r] += __shfl_xor_sync(kAll, sum[r], flip);
            if (lane == r && base + r < last) {
                const int64_t at = row * capacity + base + r;
                const int32_t feature = all ? static_cast<int32_t>(base + r) : index[at];
                if (all) index[at] = feature;
                value[at] = w.bias != nullptr ? sum[r] + widen(w.bias[feature]) : sum[r];
            }
        }
    }
}

template <class T>
void compute(uintptr_t x, uintptr_t W, uintptr_t bias, uintptr_t center, uintptr_t count, uintptr_t index,
             uintptr_t value, int64_t n, int64_t d, int64_t capacity, bool all, uintptr_t stream) {
    if (d > kWidest) throw std::runtime_error("candidate_values: a row does not fit shared memory");
    const Weights<T> weights{reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(W),
                             reinterpret_cast<const T*>(bias), reinterpret_cast<const T*>(center), d};
    const Geometry geometry{along_x("candidate_values", n, (capacity + kPart - 1) / kPart), dim3(32 * kWarps),
                            static_cast<size_t>(d) * sizeof(float), stream};
    constexpr int kAt = 16 / sizeof(T);
    launch("candidate_values",
           in_sixteens(W, d * static_cast<int64_t>(sizeof(T))) ? value_kernel<T, kAt> : value_kernel<T, 1>, geometry,
           weights, reinterpret_cast<const int32_t*>(count), reinterpret_cast<int32_t*>(index),
           reinterpret_cast<float*>(value), n, capacity, all);
}

template <class T>
void choose(const Candidates& lists, uintptr_t values, uintptr_t indices, uintptr_t candidates, int64_t n, int64_t k,
            int64_t f, bool listed, uintptr_t stream) {
    if (k > kMostActive) throw std::runtime_error("select_candidates: k winners do not fit shared memory");
    const int64_t room = std::min(up_to_power(std::max(lists.capacity, k)), 2 * up_to_power(k));
    const int64_t kept = lists.capacity > room && lists.capacity <= kKept ? lists.capacity : 0;
    const unsigned threads = lists.capacity <= 1024 ? 128 : room <= 2048 ? 256 : 512;
    const Geometry geometry{dim3(static_cast<unsigned>(n)), dim3(threads),
                            static_cast<size_t>(room + kept) * sizeof(uint64_t), stream};
    launch("select_candidates", select_kernel<T>, geometry, lists, reinterpret_cast<T*>(values),
           reinterpret_cast<int32_t*>(indices), reinterpret_cast<int32_t*>(candidates), k, f, room, listed);
}

}  // namespace

void candidate_values(bool half, uintptr_t x, uintptr_t W, uintptr_t bias, uintptr_t center, uintptr_t count,
                      uintptr_t index, uintptr_t value, int64_t n, int64_t d, int64_t capacity, bool all,
                      uintptr_t stream) {
    (half ? compute<Bf16> : compute<float>)(x, W, bias, center, count, index, value, n, d, capacity, all, stream);
}

void select_candidates(bool half, uintptr_t theta, uintptr_t count, uintptr_t index, uintptr_t value, uintptr_t failed,
                       uintptr_t failures, uintptr_t values, uintptr_t indices, uintptr_t candidates, int64_t n,
                       int64_t k, int64_t f, int64_t capacity, bool listed, uintptr_t stream) {
    const Candidates lists{reinterpret_cast<const float*>(theta),
                           reinterpret_cast<const int32_t*>(count),
                           reinterpret_cast<const int32_t*>(index),
                           reinterpret_cast<const float*>(value),
                           reinterpret_cast<int32_t*>(failed),
                           reinterpret_cast<int32_t*>(failures),
                           capacity};
    (half ? choose<Bf16> : choose<float>)(lists, values, indices, candidates, n, k, f, listed, stream);
}

}  // namespace microtome::cuda
