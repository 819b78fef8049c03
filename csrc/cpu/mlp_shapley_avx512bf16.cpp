#include "cpu/delta_linear_pairs.h"
#include "cpu/mlp_shapley_kernel.h"

namespace microtome::cpu {

const MlpKernels kMlpHalfAvx512Bf16 = kMlpKernels<Pairs, PairPanel>;

}  // namespace microtome::cpu
