#include "cpu/delta_linear_widen.h"

namespace microtome::cpu {

const PanelKernels kDeltaLinearAvx2 = kPanelKernels<Widened>;

}  // namespace microtome::cpu
