#include "cpu/screen_weights.h"

#include <algorithm>

#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/screen_weights_kernel.h"

namespace microtome::cpu {

bool screen_weights(uintptr_t W, int64_t f, int64_t d, int64_t stride, int kind, uintptr_t shadow, uintptr_t stats,
                    const char* isa, int threads) {
    ScreenRows rows = screen_rows;
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa);
    if (level >= Isa::kAvx512) {
        rows = kScreenRowsAvx512;
    } else if (level >= Isa::kAvx2) {
        rows = kScreenRowsAvx2;
    }
#else
    (void)isa;
#endif
    constexpr int64_t kBlock = 64;
    int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : bad)
    for (int64_t begin = 0; begin < f; begin += kBlock) {
        const int64_t first = rows(reinterpret_cast<const float*>(W), begin, std::min(begin + kBlock, f), d, stride,
                                   kind, reinterpret_cast<int16_t*>(shadow), reinterpret_cast<float*>(stats));
        bad |= first >= 0;
    }
    return bad == 0;
}

}  // namespace microtome::cpu
