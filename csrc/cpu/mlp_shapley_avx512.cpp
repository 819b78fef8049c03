#include "cpu/delta_linear_widen.h"
#include "cpu/mlp_shapley_kernel.h"

namespace microtome::cpu {

const MlpKernels kMlpAvx512 = kMlpKernels<Float32, FloatPanel>;
const MlpKernels kMlpHalfAvx512 = kMlpKernels<Widened, Dense>;

}  // namespace microtome::cpu
