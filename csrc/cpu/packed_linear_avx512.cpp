#include "cpu/packed_linear_kernel.h"

namespace microtome::cpu {

const PanelKernels kPackedLinearAvx512 = kPanelKernels<Float32>;

}  // namespace microtome::cpu
