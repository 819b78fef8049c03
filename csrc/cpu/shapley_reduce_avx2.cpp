#include "cpu/shapley_reduce_kernel.h"

namespace microtome::cpu {

const ShapleyReduceKernels kShapleyReduceAvx2 = kKernels;

}  // namespace microtome::cpu
