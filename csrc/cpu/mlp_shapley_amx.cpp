#include "common/amx.h"
#include "cpu/delta_linear_tiles.h"
#include "cpu/mlp_shapley_kernel.h"

namespace microtome::cpu {
namespace {

template <class Unit>
void evaluate(const Mlp& mlp, const WalkStep* steps, int64_t count, char* scratch, float* values) {
    const TilesInUse<Unit> tiles;
    MlpLevel<Tiles<Unit>, Dense>::evaluate(mlp, steps, count, scratch, values);
}

template <class Unit>
constexpr MlpKernels kOn = {MlpLevel<Tiles<Unit>, Dense>::scratch_bytes, MlpLevel<Tiles<Unit>, Dense>::prepare,
                            evaluate<Unit>};

}  // namespace

const MlpKernels kMlpHalfAmx[2] = {kOn<Amx>, kOn<EmulatedAmx>};

}  // namespace microtome::cpu
