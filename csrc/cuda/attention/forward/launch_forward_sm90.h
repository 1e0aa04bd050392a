// Which instance of the sm_90a forward kernel a call launches, and with what.
#pragma once

#include "cuda/attention/forward/forward_sm90.h"
#include "cuda/attention/shared/launch.h"
#include "cuda/attention/shared/launch_kernel.h"
#include "cuda/device.h"
#include "cuda/ptx/element.h"

namespace drope::cuda {

// Tiles of one length need no queue: every gridDim.x-th one is as good as any.
inline bool tiles_differ(const AttentionForwardParams& p) {
  return p.mask.causal || p.mask.window > 0 || p.mask.kv_start != nullptr ||
         p.mask.kv_end != nullptr || p.cu_seqlens_q != nullptr;
}

template <class Config, class T, class Position>
cudaError_t launch_forward_sm90(const AttentionForwardParams& params, cudaStream_t stream) {
  using Smem = typename Config::Smem;
  constexpr int kSlabCols = Smem::QTile::kSlabCols;
  const DeviceProperties device = current_device();
  const TileSchedule schedule = query_tiles<Config::BLOCK_Q>(params, device.l2_bytes);
  if (schedule.num_tiles == 0) return cudaSuccess;
  const auto num_blocks = num_persistent_blocks(schedule.num_tiles, device.num_sms, 1);
  TileQueue queue{schedule, nullptr};
  if (num_blocks < schedule.num_tiles && tiles_differ(params)) {
    queue.num_taken = params.num_tiles_taken;
    const cudaError_t status = cudaMemsetAsync(queue.num_taken, 0, sizeof(int32_t), stream);
    if (status != cudaSuccess) return status;
  }
  const ForwardSm90Maps maps{encode_tensor_map(queries_of(params), tile::kWarpgroupRows, kSlabCols),
                             encode_tensor_map(keys_of(params), Config::BLOCK_KV, kSlabCols),
                             encode_tensor_map(values_of(params), Config::BLOCK_KV, kSlabCols)};
  return launch_kernel(forward_sm90_kernel<Config, T, Position>,
                       dim3(static_cast<unsigned>(num_blocks)), Config::kNumThreads, sizeof(Smem),
                       stream, params, maps, queue);
}

template <class Config, class T>
cudaError_t launch_forward_sm90(const AttentionForwardParams& params, cudaStream_t stream) {
  return params.rotary.rotary_dim > 0 ? launch_forward_sm90<Config, T, Rotary>(params, stream)
                                      : launch_forward_sm90<Config, T, NoPosition>(params, stream);
}

template <int HEAD_DIM>
cudaError_t launch_forward_sm90(const AttentionForwardParams& params, cudaStream_t stream) {
  using Config = ForwardSm90Config<HEAD_DIM>;
  return params.dtype == DType::kBFloat16
             ? launch_forward_sm90<Config, ptx::BFloat16>(params, stream)
             : launch_forward_sm90<Config, ptx::Float16>(params, stream);
}

}  // namespace drope::cuda
