#include "cuda/attention/forward/launch_forward_sm80.h"

namespace drope::cuda {

cudaError_t launch_forward_sm80_d256(const AttentionForwardParams& params, cudaStream_t stream) {
  return launch_forward_sm80<256>(params, stream);
}

}  // namespace drope::cuda
