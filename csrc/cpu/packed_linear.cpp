#include "cpu/packed_linear.h"

#include "common/isa.h"
#include "cpu/packed_linear_kernel.h"

namespace microtome::cpu {
namespace {

const PanelKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa.c_str());
    if (level >= Isa::kAvx512) return kPackedLinearAvx512;
    if (level == Isa::kAvx2) return kPackedLinearAvx2;
#else
    static_cast<void>(isa);
#endif
    return kPanelKernels<Float32>;
}

}  // namespace

void packed_linear(uintptr_t x, int64_t x_stride, uintptr_t packed, uintptr_t bias, uintptr_t add, int64_t add_stride,
                   uintptr_t y, int64_t T, int64_t i, int64_t o, const std::string& isa, int threads) {
    PanelProduct p{};
    p.T = T, p.i = i, p.o = o;
    p.x = reinterpret_cast<const float*>(x), p.x_stride = x_stride;
    p.packed = reinterpret_cast<const void*>(packed);
    p.bias = reinterpret_cast<const float*>(bias);
    p.add = reinterpret_cast<const float*>(add), p.add_stride = add_stride;
    p.y = reinterpret_cast<float*>(y);
    run_panels(p, kernels(isa), threads);
}

}  // namespace microtome::cpu
