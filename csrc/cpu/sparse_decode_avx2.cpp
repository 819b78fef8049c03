#include "cpu/sparse_decode_kernel.h"

namespace microtome::cpu {

const SparseDecodeKernels kSparseDecodeAvx2 = {kTable<float>, kTable<bf16>};

}  // namespace microtome::cpu
