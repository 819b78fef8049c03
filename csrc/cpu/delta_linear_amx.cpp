// delta_linear on AMX tiles. What is read where is delta_linear_tiles.h, which the generic level runs as well.
#include "cpu/delta_linear_amx.h"

namespace microtome::cpu {
namespace {

void run(const PanelProduct& p, int64_t r0, int64_t r1, int64_t p0, int64_t p1, int64_t block, char* scratch) {
    _tile_loadconfig(&kConfig);
    run_level<Tiles<Amx>>(p, r0, r1, p0, p1, block, scratch);
    _tile_release();
}

}  // namespace

const PanelKernels kDeltaLinearAmx = {Tiles<Amx>::kRows, Tiles<Amx>::kGranule, Tiles<Amx>::row_bytes, run};

}  // namespace microtome::cpu
