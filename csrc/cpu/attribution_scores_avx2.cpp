#include "cpu/attribution_scores_kernel.h"

namespace microtome::cpu {

const AttributionKernels kAttributionAvx2 = {score_rows<float>, score_rows<bf16>};

}  // namespace microtome::cpu
