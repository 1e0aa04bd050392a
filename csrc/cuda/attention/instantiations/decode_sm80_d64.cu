#include "cuda/attention/decode/launch_decode_sm80.h"

namespace drope::cuda {

cudaError_t launch_decode_sm80_d64(const AttentionDecodeParams& params, cudaStream_t stream) {
  return launch_decode_sm80<64>(params, stream);
}

}  // namespace drope::cuda
