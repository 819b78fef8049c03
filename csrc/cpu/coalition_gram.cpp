#include "cpu/coalition_gram.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/coalition_gram_kernel.h"

namespace microtome::cpu {
namespace {

constexpr int64_t kSegment = 8192;          // coalitions summed apart, so that threads can share one explicand
constexpr int64_t kSums = 1 << 19;          // numbers of segments' sums kept at a time: 4 MiB
constexpr int64_t kWorthAThread = 1 << 13;  // additions to a table in several times what it takes to wake a thread

const CoalitionGramKernels& kernels(const std::string& isa) {
#if defined(MICROTOME_X86)
    const Isa level = isa_from_name(isa.c_str());
    if (level >= Isa::kAvx512) return kCoalitionGramAvx512;
    if (level == Isa::kAvx2) return kCoalitionGramAvx2;
#else
    static_cast<void>(isa);
#endif
    return kKernels;
}

// For each of `units`, the sums of its segments, `size` numbers each, by sum(unit, begin, end, scratch, out); then
// keep(unit, total), the total in the order of the segments. `cost` is the additions to a table of one segment.
template <class Sum, class Keep>
void by_segments(int64_t units, int64_t K, int64_t size, int64_t scratch, int64_t cost, int threads, const Sum& sum,
                 const Keep& keep) {
    const int64_t segments = std::max<int64_t>((K + kSegment - 1) / kSegment, 1);
    const int64_t batch = std::clamp<int64_t>(kSums / (segments * size), 1, std::max<int64_t>(units, 1));
    const int64_t tasks = std::min(batch * segments, units * segments * cost / kWorthAThread);
    const int team = static_cast<int>(std::clamp<int64_t>(tasks, 1, threads));
    const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(batch * segments * size)]);
#pragma omp parallel num_threads(team)
    {
        const std::unique_ptr<double[]> own(new double[static_cast<size_t>(scratch + 8)]);
        double* aligned = own.get() + (64 - reinterpret_cast<uintptr_t>(own.get()) % 64) % 64 / sizeof(double);
        for (int64_t first = 0; first < units; first += batch) {
            const int64_t count = std::min(batch, units - first);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < count * segments; ++task) {
                const int64_t begin = task % segments * kSegment;
                sum(first + task / segments, begin, std::min(begin + kSegment, K), aligned, sums.get() + task * size);
            }
#pragma omp for schedule(static)
            for (int64_t unit = 0; unit < count; ++unit) {
                double* total = sums.get() + unit * segments * size;
                for (int64_t s = 1; s < segments; ++s) {
                    for (int64_t i = 0; i < size; ++i) total[i] += total[s * size + i];
                }
                keep(first + unit, total);
            }
        }
    }
}

// Tile t of the lower half: rows of group `row`, columns of group `column`.
struct Tile {
    int64_t row, column;
};

std::vector<Tile> lower_half(int64_t groups) {
    std::vector<Tile> tiles;
    for (int64_t row = 0; row < groups; ++row) {
        for (int64_t column = 0; column <= row; ++column) tiles.push_back({row, column});
    }
    return tiles;
}

void keep_tile(const CoalitionGram& a, const Tile& t, const double* tile, double* gram) {
    const int64_t rows = std::min(kGroup, a.p - t.row * kGroup), size = a.p + 1;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = 1 + t.row * kGroup + r, columns = t.row == t.column ? r + 1 : kGroup;
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t j = 1 + t.column * kGroup + c;
            gram[i * size + j] = gram[j * size + i] = tile[r * kGroup + c];
        }
        if (t.row == t.column) gram[i] = gram[i * size] = gram[i * size + i];  // a bit is its own square
    }
}

// Eight sums side by side, then one after another: a single one would wait for every addition.
double total_weight(const double* weights, int64_t begin, int64_t end) {
    double lanes[8] = {};
    int64_t k = begin;
    for (; k + 8 <= end; k += 8) {
        for (int i = 0; i < 8; ++i) lanes[i] += weights[k + i];
    }
    for (; k < end; ++k) lanes[(k - begin) % 8] += weights[k];
    for (int i = 1; i < 8; ++i) lanes[0] += lanes[i];
    return lanes[0];
}

void gram(const CoalitionGram& a, const CoalitionGramKernels& kernel, int threads) {
    const std::vector<Tile> tiles = lower_half((a.p + kGroup - 1) / kGroup);
    const auto each = static_cast<int64_t>(tiles.size()), size = (a.p + 1) * (a.p + 1);
    by_segments(
        a.g * each, a.K, kTile + 1, kTable, std::min(a.K, kSegment), threads,
        [&](int64_t unit, int64_t begin, int64_t end, double* table, double* sums) {
            const auto [row, column] = tiles[static_cast<size_t>(unit % each)];
            kernel.tile(a, unit / each, row, column, begin, end, table, sums);
            sums[kTile] = total_weight(a.weights + unit / each * a.K, begin, end);
        },
        [&](int64_t unit, const double* sums) {
            double* out = a.gram + unit / each * size;
            keep_tile(a, tiles[static_cast<size_t>(unit % each)], sums, out);
            if (unit % each == 0) out[0] = sums[kTile];
        });
}

void moments(const CoalitionGram& a, const CoalitionGramKernels& kernel, int threads) {
    const int64_t columns = a.e * a.o, blocks = (columns + kGroup - 1) / kGroup;
    const int64_t groups = (a.p + kGroup - 1) / kGroup, size = (1 + kGroup * groups) * kGroup;
    const auto width = [&](int64_t block) { return std::min(kGroup, columns - block * kGroup); };
    by_segments(
        blocks, a.K, size, kPacked * kGroup + kTable * groups, std::min(a.K, kSegment) * groups, threads,
        [&](int64_t block, int64_t begin, int64_t end, double* scratch, double* sums) {
            kernel.moments(a, block * kGroup, width(block), begin, end, scratch, sums);
        },
        [&](int64_t block, const double* sums) {
            for (int64_t c = 0; c < width(block); ++c) {
                const int64_t column = block * kGroup + c;
                double* out = a.moments + column / a.o * (a.p + 1) * a.o + column % a.o;
                for (int64_t j = 0; j <= a.p; ++j) out[j * a.o] = sums[j * kGroup + c];
            }
        });
}

}  // namespace

void coalition_gram(uintptr_t coalitions, uintptr_t weights, uintptr_t values, int64_t K, int64_t w, int64_t g,
                    int64_t e, int64_t o, int64_t p, uintptr_t gram_at, uintptr_t moments_at, const std::string& isa,
                    int threads) {
    const auto numbers = [](uintptr_t address) { return reinterpret_cast<double*>(address); };
    const CoalitionGram a = {reinterpret_cast<const uint64_t*>(coalitions),
                             numbers(weights),
                             numbers(values),
                             K,
                             w,
                             g,
                             e,
                             o,
                             p,
                             numbers(gram_at),
                             numbers(moments_at)};
    gram(a, kernels(isa), threads);
    moments(a, kernels(isa), threads);
}

}  // namespace microtome::cpu
