// Attention forward on Hopper (sm_90a), FlashAttention-3's schedule (arXiv 2407.08608): persistent
// blocks of one producer warpgroup, which copies by TMA, and two or three consumer warpgroups of 64
// queries each, which multiply by wgmma. docs/the-forward-kernel.md tells the schedule.
#pragma once

#include "cuda/attention/forward/forward_sm90_consumer.h"
#include "cuda/attention/forward/forward_sm90_producer.h"
#include "cuda/ptx/elect.h"
#include "cuda/ptx/setmaxnreg.h"

namespace drope::cuda {

template <class Config, class T, class Position>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    forward_sm90_kernel(const __grid_constant__ AttentionForwardParams params,
                        const __grid_constant__ ForwardSm90Maps maps,
                        const __grid_constant__ TileQueue queue) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::Smem*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.q_barriers.init(Config::kNumConsumerWarps);
    smem.k_barriers.init(Config::kNumConsumerWarps);
    smem.v_barriers.init(Config::kNumConsumerWarps);
    smem.next_tile.barriers.init(Config::kNumConsumerWarps);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&maps.q.map);
    ptx::prefetch_tensormap(&maps.k.map);
    ptx::prefetch_tensormap(&maps.v.map);
  }
  __syncthreads();

  // From one lane, so that the compiler sees it is the same in all.
  const int warp = tile::from_lane(static_cast<int>(threadIdx.x) / tile::kWarpSize, 0);
  const int warpgroup = warp / 4;
  if (warpgroup == Config::kNumConsumers) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (warp % 4 != 0) return;
    ForwardProducer<Config> producer(smem, maps);  // of the lane that is elected, always the same
    TileFinder<Config::BLOCK_Q> tiles(params, queue, smem.next_tile);
    for (TilePlace at = tiles.first(); at.sequence >= 0; at = tiles.following()) {
      const ForwardTile work = forward_tile<Config>(params, queue.schedule, at);
      if (ptx::elect_sync()) producer.copy_tile(work);
      __syncwarp();
    }
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    ForwardConsumer<Config, T, Position> consumer(smem, params, warpgroup);
    TileReceiver tiles(smem.next_tile);
    for (TilePlace at = tiles.wait(); at.sequence >= 0; at = tiles.wait()) {
      consumer.attend_tile(forward_tile<Config>(params, queue.schedule, at));
    }
  }
}

}  // namespace drope::cuda
