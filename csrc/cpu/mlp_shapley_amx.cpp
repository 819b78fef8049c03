#include "cpu/delta_linear_amx.h"
#include "cpu/mlp_shapley_kernel.h"

namespace microtome::cpu {
namespace {

using OnTiles = MlpLevel<Tiles<Amx>, Dense>;

void evaluate(const Mlp& mlp, const WalkStep* steps, int64_t count, char* scratch, float* values) {
    _tile_loadconfig(&kConfig);
    OnTiles::evaluate(mlp, steps, count, scratch, values);
    _tile_release();
}

}  // namespace

const MlpKernels kMlpHalfAmx = {OnTiles::scratch_bytes, OnTiles::prepare, evaluate};

}  // namespace microtome::cpu
