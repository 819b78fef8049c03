#include "cpu/coalition_inputs.h"

#include <algorithm>

#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/coalition_inputs_kernel.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kPlayer = 5;              // the code of a player outside [-1, p)
constexpr int64_t kWorthAThread = 1 << 18;  // bytes written in several times what it takes to wake a thread

const CoalitionKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa.c_str());
    if (level >= Isa::kAvx512) return kCoalitionAvx512;
    if (level == Isa::kAvx2) return kCoalitionAvx2;
#else
    static_cast<void>(isa);
#endif
    return kKernels;
}

// The first column whose player lies outside [-1, p), or -1.
int64_t bad_player(const CoalitionInputs& a) {
    const auto outside = [&](int32_t j) { return j < -1 || j >= a.p; };
    if (a.player == nullptr) return -1;
    const int32_t* found = std::find_if(a.player, a.player + a.m, outside);
    return found == a.player + a.m ? -1 : found - a.player;
}

}  // namespace

std::pair<int64_t, int64_t> coalition_inputs(const CoalitionInputs& a, int64_t R, int64_t size, const std::string& isa,
                                             int threads) {
    if (const int64_t column = bad_player(a); column >= 0) return {kPlayer, column};
    const auto fill = kernels(isa).fill[size == 1 ? 0 : size == 2 ? 1 : size == 4 ? 2 : 3];
    const int team = static_cast<int>(std::clamp<int64_t>(R * a.m * size / kWorthAThread, 1, threads));
    CoalitionProblem first = {0, R};
    if (team == 1) {
        first = fill(a, 0, R);
    } else {
#pragma omp parallel num_threads(team)
        {
            const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
            const CoalitionProblem found = fill(a, R * t / of, R * (t + 1) / of);
            if (found.code) {
#pragma omp critical
                if (found.at < first.at) first = found;
            }
        }
    }
    return {first.code, first.code ? first.at : 0};
}

}  // namespace microtome::cpu
