#include "cpu/coalition_gram_kernel.h"

namespace microtome::cpu {

const CoalitionGramKernels kCoalitionGramAvx512 = kKernels;

}  // namespace microtome::cpu
