#include "cpu/shapley_reduce_kernel.h"

namespace microtome::cpu {

const ShapleyReduceKernels kShapleyReduceAvx512 = kKernels;

}  // namespace microtome::cpu
