#include "cpu/sae_loss_kernel.h"

namespace microtome::cpu {

const SaeLossKernels kSaeLossAvx512 = {loss_rows<float>, loss_rows<bf16>};

}  // namespace microtome::cpu
