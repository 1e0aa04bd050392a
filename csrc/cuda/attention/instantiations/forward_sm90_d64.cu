#include "cuda/attention/forward/launch_forward_sm90.h"

namespace drope::cuda {

cudaError_t launch_forward_sm90_d64(const AttentionForwardParams& params, cudaStream_t stream) {
  return launch_forward_sm90<64>(params, stream);
}

}  // namespace drope::cuda
