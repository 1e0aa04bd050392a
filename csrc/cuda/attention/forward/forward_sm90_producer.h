// The warp that fills shared memory: q once a tile, then keys and values block by block, as far
// ahead of the consumers as there are stages.
#pragma once

#include "cuda/attention/forward/forward_sm90_config.h"
#include "cuda/attention/forward/forward_sm90_tile.h"
#include "cuda/tile/tensor_box.h"

namespace drope::cuda {

// One thread of it.
template <class Config>
struct ForwardProducer {
  using Smem = typename Config::Smem;
  using KvPipeline = tile::Pipeline<Config::kStages>;

  Smem& smem;
  const ForwardSm90Maps& maps;
  tile::Pipeline<1> q_pipeline;
  KvPipeline k_pipeline, v_pipeline;

  __device__ __forceinline__ ForwardProducer(Smem& shared, const ForwardSm90Maps& tensors)
      : smem(shared),
        maps(tensors),
        q_pipeline(shared.q_barriers),
        k_pipeline(shared.k_barriers),
        v_pipeline(shared.v_barriers) {}

  __device__ __forceinline__ void copy_queries(const ForwardTile& work) {
    q_pipeline.wait_empty();
    ptx::mbarrier_arrive_expect_tx(q_pipeline.full_barrier(), sizeof(smem.q));
    const int row = static_cast<int>(work.sequence.first_q) + work.first_row;
#pragma unroll
    for (int i = 0; i < Config::kNumConsumers; ++i) {
      tile::copy_box_async(smem.q[i], maps.q, q_pipeline.full_barrier(),
                           row + i * tile::kWarpgroupRows, work.head,
                           static_cast<int>(work.sequence.batch));
    }
    q_pipeline.advance();
  }

  __device__ __forceinline__ void copy_block(KvPipeline& pipeline,
                                             typename Smem::KvTile (&stages)[Config::kStages],
                                             const HeadTensorMap& tensor, const ForwardTile& work,
                                             int kv_block) {
    const Sequence& s = work.sequence;
    pipeline.wait_empty();
    ptx::mbarrier_arrive_expect_tx(pipeline.full_barrier(), Smem::KvTile::kBytes);
    tile::copy_box_async(stages[pipeline.stage], tensor, pipeline.full_barrier(),
                         static_cast<int>(s.first_k) + kv_block * Config::BLOCK_KV, work.kv_head,
                         static_cast<int>(s.batch));
    pipeline.advance();
  }

  // In the order in which the consumers ask: the keys of a block before the values of the block
  // that they come to first.
  __device__ __forceinline__ void copy_tile(const ForwardTile& work) {
    const BlockRange& kv_blocks = work.kv_blocks;
    int kv_block = kv_blocks.end - 1;
    if (!kv_blocks.empty()) copy_block(k_pipeline, smem.k, maps.k, work, kv_block);
    copy_queries(work);
    for (; kv_block >= kv_blocks.begin; --kv_block) {
      if (kv_block > kv_blocks.begin) copy_block(k_pipeline, smem.k, maps.k, work, kv_block - 1);
      copy_block(v_pipeline, smem.v, maps.v, work, kv_block);
    }
  }
};

}  // namespace drope::cuda
