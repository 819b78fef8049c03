// What the kernels of this folder can be asked about the current device.
#pragma once

namespace microtome::cuda {

// Whether they were compiled for it; they are all compiled for the same architectures.
bool compiled_for_device();

}  // namespace microtome::cuda
