#include "common/isa.h"

#include <cstring>

#if defined(MICROTOME_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace microtome {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(MICROTOME_X86)
bool amx_permitted() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
    constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
    return false;
#endif
}

Isa detect() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kGeneric;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (!avx512) return Isa::kAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
    return amx_permitted() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
Isa detect() { return Isa::kGeneric; }
#endif

}  // namespace

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

bool amx_is_emulated() {
#if defined(MICROTOME_EMULATE_AMX)
    return best_isa() == Isa::kAvx512Bf16;
#else
    return false;
#endif
}

Isa highest_isa() { return amx_is_emulated() ? Isa::kAmx : best_isa(); }

Isa isa_from_name(const char* forced) {
    for (int level = 0; level <= static_cast<int>(Isa::kAmx); ++level) {
        if (std::strcmp(forced, kNames[level]) == 0) {
            return level < static_cast<int>(highest_isa()) ? static_cast<Isa>(level) : highest_isa();
        }
    }
    return best_isa();
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace microtome
