#include "cpu/sparse_decode.h"

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "cpu/sparse_decode_kernel.h"

namespace microtome::cpu {
namespace {

constexpr SparseDecodeKernels kGeneric = {kTable<float>, kTable<bf16>};

const SparseDecodeKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa.c_str());
    if (level >= Isa::kAvx512) return kSparseDecodeAvx512;
    if (level == Isa::kAvx2) return kSparseDecodeAvx2;
#else
    static_cast<void>(isa);
#endif
    return kGeneric;
}

template <class T>
const SparseDecodeTable<T>& table(const std::string& isa) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return kernels(isa).f32;
    } else {
        return kernels(isa).b16;
    }
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
void decode(uintptr_t values, uintptr_t indices, uintptr_t W, uintptr_t b, uintptr_t out, int64_t n, int64_t k,
            int64_t d, const std::string& isa, int team) {
    const auto& run = table<T>(isa);
    std::vector<float> scratch(static_cast<size_t>(team * padded(d)));
#pragma omp parallel num_threads(team)
    {
        const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
        run.decode(at<T>(values), at<int32_t>(indices), at<T>(W), at<T>(b), at<T>(out), scratch.data() + t * padded(d),
                   n * t / of, n * (t + 1) / of, k, d);
    }
}

template <class T>
void grad_values(uintptr_t grad_out, uintptr_t indices, uintptr_t W, uintptr_t out, int64_t n, int64_t k, int64_t d,
                 const std::string& isa, int team) {
    const auto& run = table<T>(isa);
#pragma omp parallel num_threads(team)
    {
        const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
        run.grad_values(at<T>(grad_out), at<int32_t>(indices), at<T>(W), at<T>(out), n * t / of, n * (t + 1) / of, k,
                        d);
    }
}

template <class T>
void grad_W_dec(uintptr_t values, uintptr_t indices, uintptr_t grad_out, uintptr_t out, int64_t n, int64_t k, int64_t d,
                int64_t f, const std::string& isa, int team) {
    const auto& run = table<T>(isa);
    std::vector<int64_t> order(static_cast<size_t>(n * k)), offsets(static_cast<size_t>(f + 1));
    sort_by_latent(at<int32_t>(indices), n * k, f, order.data(), offsets.data(), team);
    std::vector<float> scratch(static_cast<size_t>(2 * team * padded(d)));
    constexpr int64_t kFeatures = 32;  // features taken at a time: segments differ in length
    const int64_t blocks = (f + kFeatures - 1) / kFeatures;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
        run.grad_W_dec(at<T>(values), at<T>(grad_out), order.data(), offsets.data(), at<T>(out),
                       scratch.data() + 2 * padded(d) * omp_get_thread_num(), block * kFeatures,
                       std::min((block + 1) * kFeatures, f), k, d);
    }
}

int team_of(int threads, int64_t tasks) { return static_cast<int>(std::clamp<int64_t>(tasks, 1, threads)); }

}  // namespace

int64_t sparse_decode(bool half, uintptr_t values, uintptr_t indices, uintptr_t W, uintptr_t b, uintptr_t out,
                      int64_t n, int64_t k, int64_t d, int64_t f, const std::string& isa, int threads) {
    const int64_t bad = first_outside(at<int32_t>(indices), n * k, f);
    const auto run = half ? decode<bf16> : decode<float>;
    if (bad < 0) run(values, indices, W, b, out, n, k, d, isa, team_of(threads, n));
    return bad;
}

int64_t sparse_decode_grad_values(bool half, uintptr_t grad_out, uintptr_t indices, uintptr_t W, uintptr_t out,
                                  int64_t n, int64_t k, int64_t d, int64_t f, const std::string& isa, int threads) {
    const int64_t bad = first_outside(at<int32_t>(indices), n * k, f);
    const auto run = half ? grad_values<bf16> : grad_values<float>;
    if (bad < 0) run(grad_out, indices, W, out, n, k, d, isa, team_of(threads, n));
    return bad;
}

int64_t sparse_decode_grad_W_dec(bool half, uintptr_t values, uintptr_t indices, uintptr_t grad_out, uintptr_t out,
                                 int64_t n, int64_t k, int64_t d, int64_t f, const std::string& isa, int threads) {
    const int64_t bad = first_outside(at<int32_t>(indices), n * k, f);
    const auto run = half ? grad_W_dec<bf16> : grad_W_dec<float>;
    if (bad < 0) run(values, indices, grad_out, out, n, k, d, f, isa, team_of(threads, f));
    return bad;
}

}  // namespace microtome::cpu
