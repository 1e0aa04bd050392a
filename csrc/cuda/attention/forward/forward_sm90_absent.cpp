// Stands in for instantiations/forward_sm90_*.cu where TORCH_CUDA_ARCH_LIST left compute capability
// 9.0 out. build_info() says so, and Python then takes the sm_80 kernels.
#include "cuda/attention/shared/launch.h"

namespace drope::cuda {

cudaError_t launch_forward_sm90_d64(const AttentionForwardParams&, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}

cudaError_t launch_forward_sm90_d128(const AttentionForwardParams&, cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}

}  // namespace drope::cuda
