// Which instances of the sm_80 backward kernels a call launches.
#pragma once

#include "cuda/attention/backward/backward_sm80.h"
#include "cuda/attention/backward/backward_sm80_dq.h"
#include "cuda/attention/backward/delta.h"
#include "cuda/attention/shared/launch.h"
#include "cuda/attention/shared/launch_kernel.h"
#include "cuda/device.h"
#include "cuda/ptx/element.h"

namespace drope::cuda {

template <class Config, class T>
cudaError_t launch_backward_delta(const AttentionBackwardParams& params,
                                  const BackwardWorkspace& workspace, int64_t l2_bytes,
                                  cudaStream_t stream) {
  const TileSchedule schedule = query_tiles<kDeltaBlock>(params, l2_bytes);
  return launch_kernel(backward_delta_kernel<Config::BLOCK_Q, T>,
                       dim3(static_cast<unsigned>(schedule.num_tiles)), kDeltaThreads, 0, stream,
                       params, workspace, schedule);
}

// dk, dv, and the sums of dq.
template <class Config, class T, class Position>
cudaError_t launch_backward_keys(const AttentionBackwardParams& params,
                                 const BackwardWorkspace& workspace, int64_t l2_bytes,
                                 cudaStream_t stream) {
  const TileSchedule schedule = key_tiles<Config::BLOCK_KV>(params, l2_bytes);
  if (schedule.num_tiles == 0) return cudaSuccess;
  return launch_kernel(backward_sm80_kernel<Config, T, Position>,
                       dim3(static_cast<unsigned>(schedule.num_tiles)), Config::kNumThreads,
                       sizeof(BackwardStorage<Config>), stream, params, workspace, schedule);
}

// dq, from its sums or, in deterministic calls, from everything.
template <class Config, class T, class Position>
cudaError_t launch_backward_queries(const AttentionBackwardParams& params,
                                    const BackwardWorkspace& workspace, int64_t l2_bytes,
                                    cudaStream_t stream) {
  if (workspace.deterministic) {
    const TileSchedule schedule = query_tiles<Config::kDqBlockQ>(params, l2_bytes);
    return launch_kernel(backward_sm80_dq_kernel<Config, T, Position>,
                         dim3(static_cast<unsigned>(schedule.num_tiles)), Config::kDqNumThreads,
                         sizeof(DqStorage<Config>), stream, params, workspace, schedule);
  }
  const TileSchedule schedule = query_tiles<Config::BLOCK_Q>(params, l2_bytes);
  return launch_kernel(grad_q_sm80_kernel<Config, T, Position>,
                       dim3(static_cast<unsigned>(schedule.num_tiles)), Config::kNumThreads,
                       sizeof(tile::FloatTile<Config::BLOCK_Q, Config::HEAD_DIM>), stream, params,
                       workspace, schedule);
}

template <int HEAD_DIM, class T, class Position>
cudaError_t launch_backward_sm80(const AttentionBackwardParams& params,
                                 const BackwardWorkspace& workspace, cudaStream_t stream) {
  using Config = BackwardSm80Config<HEAD_DIM>;
  const int64_t l2_bytes = current_device().l2_bytes;
  const bool has_queries = params.seqlen_q > 0;
  cudaError_t status = cudaSuccess;
  if (has_queries) status = launch_backward_delta<Config, T>(params, workspace, l2_bytes, stream);
  if (status == cudaSuccess && workspace.grad_q_sum_size > 0) {
    status =
        cudaMemsetAsync(workspace.grad_q_sum, 0, workspace.grad_q_sum_size * sizeof(float), stream);
  }
  if (status == cudaSuccess) {
    status = launch_backward_keys<Config, T, Position>(params, workspace, l2_bytes, stream);
  }
  if (status == cudaSuccess && has_queries) {
    status = launch_backward_queries<Config, T, Position>(params, workspace, l2_bytes, stream);
  }
  return status;
}

template <int HEAD_DIM, class T>
cudaError_t launch_backward_sm80(const AttentionBackwardParams& params,
                                 const BackwardWorkspace& workspace, cudaStream_t stream) {
  return params.rotary.rotary_dim > 0
             ? launch_backward_sm80<HEAD_DIM, T, Rotary>(params, workspace, stream)
             : launch_backward_sm80<HEAD_DIM, T, NoPosition>(params, workspace, stream);
}

template <int HEAD_DIM>
cudaError_t launch_backward_sm80(const AttentionBackwardParams& params,
                                 const BackwardWorkspace& workspace, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16
             ? launch_backward_sm80<HEAD_DIM, ptx::BFloat16>(params, workspace, stream)
             : launch_backward_sm80<HEAD_DIM, ptx::Float16>(params, workspace, stream);
}

}  // namespace drope::cuda
