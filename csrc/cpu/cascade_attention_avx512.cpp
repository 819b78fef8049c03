#include "cpu/cascade_attention_kernel.h"

namespace microtome::cpu {

const AttentionKernels kAttentionAvx512 = kKernels;

}  // namespace microtome::cpu
