#include "cpu/coalition_inputs_kernel.h"

namespace microtome::cpu {

const CoalitionKernels kCoalitionAvx512 = kKernels;

}  // namespace microtome::cpu
