#include "cpu/delta_linear_widen.h"
#include "cpu/mlp_shapley_kernel.h"

namespace microtome::cpu {

const MlpKernels kMlpAvx2 = kMlpKernels<Float32, FloatPanel>;
const MlpKernels kMlpHalfAvx2 = kMlpKernels<Widened, Dense>;

}  // namespace microtome::cpu
