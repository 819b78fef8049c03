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

// What a player adds on average over the A orders of a unit.
template <class T>
__device__ double unit_mean(const Walks<T>& w, int64_t row, int64_t u, int64_t player, int64_t output) {
    const T* v = w.values + (row * w.U + u) * w.A * w.points * w.o + output;
    const int32_t* rank = w.ranks + ((row % w.S) * w.U + u) * w.A * w.p + player;
    double total = 0.0;
    for (int64_t a = 0; a < w.A; ++a, v += w.points * w.o, rank += w.p) {
        const T* at = v + *rank * w.o;
        double step = static_cast<double>(at[w.o]) - static_cast<double>(at[0]);
        if (w.paired) {
            const T* back = at + w.p * w.o;
            step = __dmul_rn(step + (static_cast<double>(back[0]) - static_cast<double>(back[w.o])), 0.5);
        }
        total += step;
    }
    return total / static_cast<double>(w.A);
}

template <class T>
__global__ void __launch_bounds__(256) shapley_reduce_kernel(Walks<T> w, int64_t items, double* mean, double* m2) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;  // row, player, output
    if (item >= items) return;
    const int64_t output = item % w.o, player = item / w.o % w.p, row = item / (w.o * w.p);
    double sum = 0.0;
    for (int64_t u = 0; u < w.U; ++u) sum += unit_mean(w, row, u, player, output);
    const double centre = sum / static_cast<double>(w.U);
    double squares = 0.0;
    for (int64_t u = 0; u < w.U; ++u) {
        const double apart = unit_mean(w, row, u, player, output) - centre;
        squares = __dadd_rn(squares, __dmul_rn(apart, apart));
    }
    mean[item] = centre;
    m2[item] = squares;
}

template <class T>
void reduce(uintptr_t values, uintptr_t ranks, int64_t e, int64_t S, int64_t U, int64_t A, int64_t p, int64_t o,
            bool paired, uintptr_t mean, uintptr_t m2, uintptr_t stream) {
    const Walks<T> walks{
        reinterpret_cast<const T*>(values),
        reinterpret_cast<const int32_t*>(ranks),
        S,
        U,
        A,
        p,
        o,
        paired ? 2 * p + 1 : p + 1,
        paired,
    };
    const int64_t items = e * S * p * o;
    launch("shapley_reduce", shapley_reduce_kernel<T>, one_thread_each(items, stream), walks, items,
           reinterpret_cast<double*>(mean), reinterpret_cast<double*>(m2));
}

}  // namespace

void shapley_reduce(bool wide, uintptr_t values, uintptr_t ranks, int64_t e, int64_t S, int64_t U, int64_t A, int64_t p,
                    int64_t o, bool paired, uintptr_t mean, uintptr_t m2, uintptr_t stream) {
    (wide ? reduce<double> : reduce<float>)(values, ranks, e, S, U, A, p, o, paired, mean, m2, stream);
}

}  // namespace microtome::cuda
