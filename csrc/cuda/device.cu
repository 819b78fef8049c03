#include "cuda/device.cuh"
#include "cuda/device.h"

namespace microtome::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

bool compiled_for_device() {
#if defined(__CUDACC__)
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (status == cudaSuccess) return true;
    cudaGetLastError();  // forgets it
    return status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction;
#else
    static_cast<void>(&probe_kernel);
    return true;
#endif
}

}  // namespace microtome::cuda
