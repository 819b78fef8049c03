#include "cpu/delta_linear.h"

#include "common/isa.h"
#include "common/segments.h"
#include "cpu/delta_linear_plain.h"

namespace microtome::cpu {
namespace {

const PanelKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    switch (isa_from_name(isa.c_str())) {
        case Isa::kAmx:
            return kDeltaLinearAmx[amx_is_emulated()];
        case Isa::kAvx512Bf16:
            return kDeltaLinearAvx512Bf16;
        case Isa::kAvx512:
            return kDeltaLinearAvx512;
        case Isa::kAvx2:
            return kDeltaLinearAvx2;
        default:
            break;
    }
#else
    static_cast<void>(isa);
#endif
    return kPanelKernels<Tiles<PlainUnit>>;
}

}  // namespace

int64_t delta_linear(uintptr_t x, int64_t x_stride, uintptr_t x_base, int64_t x_base_stride, uintptr_t y_base,
                     int64_t y_base_stride, uintptr_t index, uintptr_t packed, uintptr_t add, int64_t add_stride,
                     uintptr_t y, int64_t T, int64_t r, int64_t i, int64_t o, const std::string& isa, int threads) {
    PanelProduct p{};
    p.T = T, p.i = i, p.o = o;
    p.x = reinterpret_cast<const float*>(x), p.x_stride = x_stride;
    p.x_base = reinterpret_cast<const float*>(x_base), p.x_base_stride = x_base_stride;
    p.index = reinterpret_cast<const int32_t*>(index);
    p.packed = reinterpret_cast<const void*>(packed);
    p.y_base = reinterpret_cast<const float*>(y_base), p.y_base_stride = y_base_stride;
    p.add = reinterpret_cast<const float*>(add), p.add_stride = add_stride;
    p.y = reinterpret_cast<float*>(y);
    const int64_t bad = first_outside(p.index, T, r);
    if (bad < 0) run_panels(p, kernels(isa), threads);
    return bad;
}

}  // namespace microtome::cpu
