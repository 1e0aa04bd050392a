#include "cuda/attention/decode/launch_decode_sm80.h"

namespace drope::cuda {

cudaError_t launch_decode_sm80_d128(const AttentionDecodeParams& params, cudaStream_t stream) {
  return launch_decode_sm80<128>(params, stream);
}

}  // namespace drope::cuda
