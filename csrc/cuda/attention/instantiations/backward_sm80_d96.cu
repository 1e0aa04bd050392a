#include "cuda/attention/backward/launch_backward_sm80.h"

namespace drope::cuda {

cudaError_t launch_backward_sm80_d96(const AttentionBackwardParams& params,
                                     const BackwardWorkspace& workspace, cudaStream_t stream) {
  return launch_backward_sm80<96>(params, workspace, stream);
}

}  // namespace drope::cuda
