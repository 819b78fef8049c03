#include "cpu/sae_update_kernel.h"

namespace microtome::cpu {
const SaeUpdateKernels kSaeUpdateAvx2 = kSaeUpdateKernels;
}
