#include "cpu/packed_linear_kernel.h"

namespace microtome::cpu {

const PanelKernels kPackedLinearAvx2 = kPanelKernels<Float32>;

}  // namespace microtome::cpu
