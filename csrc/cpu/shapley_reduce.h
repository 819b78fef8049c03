// shapley_reduce: what each player adds along walks of coalitions, averaged, and how far the units are apart.
#pragma once

#include <cstdint>
#include <string>

namespace microtome::cpu {

template <class T>
struct ShapleyReduce {
    const T* values;       // [e, S, U, A, L, o], L = p + 1, or 2 p + 1 where paired
    const int32_t* ranks;  // [S, U, A, p]
    int64_t e, S, U, A, p, o;
    bool paired;
    double *mean, *m2;  // [e, S, p, o]
};

// Addresses of contiguous tensors; values are float64 where `wide`, else float32. The flat place of the first rank
// outside [0, p), in which case nothing is written, or -1.
int64_t shapley_reduce(bool wide, uintptr_t values, uintptr_t ranks, int64_t e, int64_t S, int64_t U, int64_t A,
                       int64_t p, int64_t o, bool paired, uintptr_t mean, uintptr_t m2, const std::string& isa,
                       int threads);

// One instruction set's kernels: outputs [begin, end) of stratum s of one explicand. `scratch` holds
// scratch_numbers() doubles.
struct ShapleyReduceKernels {
    void (*f32)(const ShapleyReduce<float>& a, int64_t explicand, int64_t s, int64_t begin, int64_t end,
                double* scratch);
    void (*f64)(const ShapleyReduce<double>& a, int64_t explicand, int64_t s, int64_t begin, int64_t end,
                double* scratch);
};

// Doubles up to which the means of all units are kept between the two passes over them; beyond, they are made twice.
constexpr int64_t kKeptUnits = 1 << 16;

extern const ShapleyReduceKernels kShapleyReduceAvx2, kShapleyReduceAvx512;

}  // namespace microtome::cpu
