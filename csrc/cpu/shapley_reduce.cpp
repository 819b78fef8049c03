#include "cpu/shapley_reduce.h"

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/shapley_reduce_kernel.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kWorthAThread = 1 << 16;  // values read in several times what it takes to wake a thread
constexpr int64_t kGains = 1 << 13;         // of one order: 64 KiB, so that players find theirs in the cache

const ShapleyReduceKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa.c_str());
    if (level >= Isa::kAvx512) return kShapleyReduceAvx512;
    if (level == Isa::kAvx2) return kShapleyReduceAvx2;
#else
    static_cast<void>(isa);
#endif
    return kKernels;
}

int64_t bad_rank(const int32_t* ranks, int64_t count, int64_t p) {
    const auto most = static_cast<uint32_t>(p);
    bool bad = false;
    for (int64_t i = 0; i < count; ++i) bad |= static_cast<uint32_t>(ranks[i]) >= most;
    if (!bad) return -1;
    return std::find_if(ranks, ranks + count, [&](int32_t r) { return static_cast<uint32_t>(r) >= most; }) - ranks;
}

// A task is a stratum of an explicand and some of its outputs.
template <class T, class Kernel>
void run(const ShapleyReduce<T>& a, Kernel kernel, int threads) {
    if (a.p == 0) return;
    const int64_t width = std::clamp<int64_t>(kGains / a.p, 1, std::max<int64_t>(a.o, 1));
    const int64_t parts = (a.o + width - 1) / width, tasks = a.e * a.S * parts, size = a.p * width;
    const int64_t numbers = 3 * size + (a.U * size <= kKeptUnits ? a.U * size : size);
    const int64_t read = a.e * a.S * a.U * a.A * (a.p + 1) * a.o;
    const int team = static_cast<int>(std::clamp<int64_t>(std::min(tasks, read / kWorthAThread), 1, threads));
#pragma omp parallel num_threads(team)
    {
        std::vector<double> scratch(static_cast<size_t>(numbers));
        const int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
        for (int64_t task = tasks * t / of; task < tasks * (t + 1) / of; ++task) {
            const int64_t stratum = task / parts, begin = task % parts * width;
            kernel(a, stratum / a.S, stratum % a.S, begin, std::min(begin + width, a.o), scratch.data());
        }
    }
}

}  // namespace

int64_t shapley_reduce(bool wide, uintptr_t values, uintptr_t ranks, int64_t e, int64_t S, int64_t U, int64_t A,
                       int64_t p, int64_t o, bool paired, uintptr_t mean, uintptr_t m2, const std::string& isa,
                       int threads) {
    const auto* places = reinterpret_cast<const int32_t*>(ranks);
    if (const int64_t bad = bad_rank(places, S * U * A * p, p); bad >= 0) return bad;
    const auto go = [&](auto kernel, auto zero) {
        using T = decltype(zero);
        run<T>({reinterpret_cast<const T*>(values), places, e, S, U, A, p, o, paired, reinterpret_cast<double*>(mean),
                reinterpret_cast<double*>(m2)},
               kernel, threads);
    };
    if (wide) {
        go(kernels(isa).f64, 0.0);
    } else {
        go(kernels(isa).f32, 0.0f);
    }
    return -1;
}

}  // namespace microtome::cpu
