#include "cpu/coalition_gram_kernel.h"

namespace microtome::cpu {

const CoalitionGramKernels kCoalitionGramAvx2 = kKernels;

}  // namespace microtome::cpu
