#include "common/panels.h"

#include <algorithm>

#include "common/buffer.h"
#include "common/cache.h"
#include "common/parallel.h"

namespace microtome {
namespace {

constexpr int64_t kLeastWork = 1 << 18;  // multiply-adds that are worth a thread: a few microseconds

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many parts the rows are cut into; the panels are cut into threads / parts. The unit of cost is one row against
// one panel. A tile of few rows waits for its sums, a panel that is read takes as long as about four rows, and packing
// a row, which every part of the panels repeats, as long as half a panel.
int64_t row_parts(int64_t T, int64_t panels, const PanelKernels& kernels, int64_t threads) {
    int64_t best = 1;
    double least = -1;
    for (int64_t parts = 1; parts <= threads; ++parts) {
        const int64_t rows = std::min(T, ceil_div(ceil_div(T, kernels.granule), parts) * kernels.granule);
        const int64_t columns = ceil_div(panels, std::max<int64_t>(1, threads / parts));
        const double cost = static_cast<double>(columns) * static_cast<double>(rows + 4) + 0.5 * rows;
        if (least < 0 || cost < least) best = parts, least = cost;
    }
    return best;
}

}  // namespace

void run_panels(const PanelProduct& p, const PanelKernels& kernels, int threads) {
    const int64_t panels = ceil_div(p.o, kPanelLanes);
    if (p.T == 0 || panels == 0) return;
    const int64_t most = std::clamp<int64_t>(p.T * p.i * p.o / kLeastWork, 1, std::max(threads, 1));
    const int64_t parts = row_parts(p.T, panels, kernels, most);
    const int64_t columns = std::clamp<int64_t>(most / parts, 1, panels);
    const int64_t longest = std::min(p.T, ceil_div(ceil_div(p.T, kernels.granule), parts) * kernels.granule);
    // Half of a core's cache holds the packed rows that all its panels pass by.
    const int64_t row_bytes = kernels.row_bytes(p.i);
    const int64_t fitting = second_level_cache() / 2 / std::max<int64_t>(row_bytes, 1) / kernels.rows * kernels.rows;
    const int64_t block = std::min(longest, std::max(kernels.rows, fitting));
    const int64_t stride = ceil_div(block * row_bytes + kPanelSlack, 4096) * 4096;
    const int64_t team = parts * columns;
    const Buffer scratch = aligned(team * stride);
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1)
    for (int64_t t = 0; t < team; ++t) {
        const int64_t row = t / columns, column = t % columns;
        kernels.run(p, part_start(p.T, row, parts, kernels.granule), part_start(p.T, row + 1, parts, kernels.granule),
                    panels * column / columns, panels * (column + 1) / columns, block, scratch.get() + t * stride);
    }
}

}  // namespace microtome
