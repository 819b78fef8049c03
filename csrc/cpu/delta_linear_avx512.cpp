#include "cpu/delta_linear_widen.h"

namespace microtome::cpu {

const PanelKernels kDeltaLinearAvx512 = kPanelKernels<Widened>;

}  // namespace microtome::cpu
