#include "cpu/attribution_scores.h"

#include <algorithm>

#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/attribution_scores_kernel.h"

namespace microtome::cpu {
namespace {

constexpr AttributionKernels kGeneric = {score_rows<float>, score_rows<bf16>};
constexpr int64_t kTask = 1 << 14;  // columns below which another thread costs more than it saves

const AttributionKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa.c_str());
    if (level >= Isa::kAvx512) return kAttributionAvx512;
    if (level == Isa::kAvx2) return kAttributionAvx2;
#else
    static_cast<void>(isa);
#endif
    return kGeneric;
}

template <class Kernel, class Arguments>
void run(Kernel kernel, const Arguments& a, int64_t n, int threads) {
    const int64_t tasks = std::min(n, n * a.units * a.width / kTask);
    const int team = static_cast<int>(std::clamp<int64_t>(tasks, 1, threads));
#pragma omp parallel num_threads(team)
    {
        const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
        kernel(a, n * t / of, n * (t + 1) / of);
    }
}

}  // namespace

void attribution_scores(bool half, uintptr_t source, int64_t source_stride, uintptr_t base, int64_t base_stride,
                        uintptr_t grad, int64_t grad_stride, uintptr_t scores, uintptr_t changed, int64_t n,
                        int64_t units, int64_t width, const std::string& isa, int threads) {
    const auto go = [&](auto kernel, auto zero) {
        using T = decltype(zero);
        const auto at = [](uintptr_t address) { return reinterpret_cast<const T*>(address); };
        const AttributionArguments<T> a = {at(source),
                                           source_stride,
                                           at(base),
                                           base_stride,
                                           at(grad),
                                           grad_stride,
                                           reinterpret_cast<float*>(scores),
                                           reinterpret_cast<uint8_t*>(changed),
                                           units,
                                           width};
        run(kernel, a, n, threads);
    };
    if (half) {
        go(kernels(isa).b16, bf16{0});
    } else {
        go(kernels(isa).f32, 0.0f);
    }
}

}  // namespace microtome::cpu
