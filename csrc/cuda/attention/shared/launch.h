// The kernels as the host sees them: one function per kernel, family and HEAD_DIM, each defined by
// the file of its name in instantiations/.
#pragma once

#include <cuda_runtime.h>

#include "attention_params.h"
#include "cuda/workspace.h"

namespace drope::cuda {

// All are asynchronous on the stream, read no device value on the host, and return the status of
// their launches.

// Rotated keys, rounded once: (batch, num_heads_kv, seqlen_kv, head_dim) contiguous.
cudaError_t launch_prepare_keys(const AttentionParams& params, void* k_prepared,
                                cudaStream_t stream);

// k is prepared already; q is rotated here, and written to q_prepared where that is not null.
using LaunchForward = cudaError_t(const AttentionForwardParams& params, cudaStream_t stream);
LaunchForward launch_forward_sm80_d64, launch_forward_sm80_d96, launch_forward_sm80_d128,
    launch_forward_sm80_d256;
LaunchForward launch_forward_sm90_d64, launch_forward_sm90_d128;

using LaunchBackward = cudaError_t(const AttentionBackwardParams& params,
                                   const BackwardWorkspace& workspace, cudaStream_t stream);
LaunchBackward launch_backward_sm80_d64, launch_backward_sm80_d96, launch_backward_sm80_d128,
    launch_backward_sm80_d256;

// Appends, attends in params.num_splits parts, merges them.
using LaunchDecode = cudaError_t(const AttentionDecodeParams& params, cudaStream_t stream);
LaunchDecode launch_decode_sm80_d64, launch_decode_sm80_d96, launch_decode_sm80_d128,
    launch_decode_sm80_d256;

}  // namespace drope::cuda
