#include "cpu/sae_loss.h"

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "cpu/sae_loss_kernel.h"

namespace microtome::cpu {
namespace {

constexpr SaeLossKernels kGeneric = {loss_rows<float>, loss_rows<bf16>};

const SaeLossKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa.c_str());
    if (level >= Isa::kAvx512) return kSaeLossAvx512;
    if (level == Isa::kAvx2) return kSaeLossAvx2;
#else
    static_cast<void>(isa);
#endif
    return kGeneric;
}

template <class Kernel, class Arguments>
void run(Kernel kernel, const Arguments& a, int64_t n, int threads) {
    const int team = static_cast<int>(std::clamp<int64_t>(n, 1, threads));
    std::vector<float> scratch(static_cast<size_t>(team * padded(a.d)));
#pragma omp parallel num_threads(team)
    {
        const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
        kernel(a, scratch.data() + t * padded(a.d), n * t / of, n * (t + 1) / of);
    }
}

template <class T>
SaeLossArguments<T> arguments(uintptr_t x, uintptr_t values, uintptr_t indices, uintptr_t W, uintptr_t b, uintptr_t sse,
                              uintptr_t grad_out, uintptr_t grad_values, int64_t k, int64_t d) {
    const auto at = [](uintptr_t address) { return reinterpret_cast<T*>(address); };
    return {at(x),
            at(values),
            reinterpret_cast<const int32_t*>(indices),
            at(W),
            at(b),
            reinterpret_cast<float*>(sse),
            at(grad_out),
            at(grad_values),
            k,
            d};
}

}  // namespace

int64_t sae_loss(bool half, uintptr_t x, uintptr_t values, uintptr_t indices, uintptr_t W, uintptr_t b, uintptr_t sse,
                 uintptr_t grad_out, uintptr_t grad_values, int64_t n, int64_t k, int64_t d, int64_t f,
                 const std::string& isa, int threads) {
    const int64_t bad = first_outside(reinterpret_cast<const int32_t*>(indices), n * k, f);
    if (bad >= 0) return bad;
    if (half) {
        run(kernels(isa).b16, arguments<bf16>(x, values, indices, W, b, sse, grad_out, grad_values, k, d), n, threads);
    } else {
        run(kernels(isa).f32, arguments<float>(x, values, indices, W, b, sse, grad_out, grad_values, k, d), n, threads);
    }
    return -1;
}

}  // namespace microtome::cpu
