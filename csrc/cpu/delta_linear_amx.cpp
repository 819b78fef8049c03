// delta_linear on AMX tiles. What is read where is delta_linear_tiles.h, which the generic level runs as well.
#include "common/amx.h"
#include "cpu/delta_linear_tiles.h"

namespace microtome::cpu {
namespace {

template <class Unit>
void run(const PanelProduct& p, int64_t r0, int64_t r1, int64_t p0, int64_t p1, int64_t block, char* scratch) {
    const TilesInUse<Unit> tiles;
    run_level<Tiles<Unit>>(p, r0, r1, p0, p1, block, scratch);
}

template <class Unit>
constexpr PanelKernels kOn = {Tiles<Unit>::kRows, Tiles<Unit>::kGranule, Tiles<Unit>::row_bytes, run<Unit>};

}  // namespace

const PanelKernels kDeltaLinearAmx[2] = {kOn<Amx>, kOn<EmulatedAmx>};

}  // namespace microtome::cpu
