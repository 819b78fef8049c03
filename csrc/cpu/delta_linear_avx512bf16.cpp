#include "cpu/delta_linear_pairs.h"

namespace microtome::cpu {

const PanelKernels kDeltaLinearAvx512Bf16 = kPanelKernels<Pairs>;

}  // namespace microtome::cpu
