#include "cuda/attention/backward/launch_backward_sm80.h"

namespace drope::cuda {

cudaError_t launch_backward_sm80_d64(const AttentionBackwardParams& params,
                                     const BackwardWorkspace& workspace, cudaStream_t stream) {
  return launch_backward_sm80<64>(params, workspace, stream);
}

}  // namespace drope::cuda
