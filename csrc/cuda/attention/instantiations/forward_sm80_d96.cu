#include "cuda/attention/forward/launch_forward_sm80.h"

namespace drope::cuda {

cudaError_t launch_forward_sm80_d96(const AttentionForwardParams& params, cudaStream_t stream) {
  return launch_forward_sm80<96>(params, stream);
}

}  // namespace drope::cuda
