// Which instance of the sm_80 forward kernel a call launches.
#pragma once

#include "cuda/attention/forward/forward_sm80.h"
#include "cuda/attention/shared/launch.h"
#include "cuda/attention/shared/launch_kernel.h"
#include "cuda/device.h"
#include "cuda/ptx/element.h"

namespace drope::cuda {

template <int HEAD_DIM, class T, class Position>
cudaError_t launch_forward_sm80(const AttentionForwardParams& params, cudaStream_t stream) {
  using Config = ForwardSm80Config<HEAD_DIM>;
  const TileSchedule schedule = query_tiles<Config::BLOCK_Q>(params, current_device().l2_bytes);
  if (schedule.num_tiles == 0) return cudaSuccess;
  return launch_kernel(forward_sm80_kernel<Config, T, Position>,
                       dim3(static_cast<unsigned>(schedule.num_tiles)), Config::kNumThreads,
                       sizeof(typename Config::Smem), stream, params, schedule);
}

template <int HEAD_DIM, class T>
cudaError_t launch_forward_sm80(const AttentionForwardParams& params, cudaStream_t stream) {
  return params.rotary.rotary_dim > 0
             ? launch_forward_sm80<HEAD_DIM, T, Rotary>(params, stream)
             : launch_forward_sm80<HEAD_DIM, T, NoPosition>(params, stream);
}

template <int HEAD_DIM>
cudaError_t launch_forward_sm80(const AttentionForwardParams& params, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16
             ? launch_forward_sm80<HEAD_DIM, ptx::BFloat16>(params, stream)
             : launch_forward_sm80<HEAD_DIM, ptx::Float16>(params, stream);
}

}  // namespace drope::cuda
