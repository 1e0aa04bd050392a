// A warpgroup that attends: 64 queries of a tile against all of its blocks of keys. The softmax of
// one block runs while the tensor cores multiply the probabilities of the block before, and the
// warpgroups take turns, so that one's softmax also runs under the other's products.
#pragma once

#include <type_traits>

#include "cuda/attention/forward/forward_sm90_config.h"
#include "cuda/attention/forward/forward_sm90_softmax.h"
#include "cuda/attention/forward/forward_sm90_tile.h"
#include "cuda/attention/shared/head_rows.h"
#include "cuda/attention/shared/mask.h"
#include "cuda/attention/shared/rotary.h"
#include "cuda/ptx/barrier.h"
#include "cuda/tile/copy_rows.h"

namespace drope::cuda {

template <class Config, class T, class Position>
struct ForwardConsumer {
  static constexpr int BLOCK_KV = Config::BLOCK_KV, HEAD_DIM = Config::HEAD_DIM;
  static constexpr int kNumConsumers = Config::kNumConsumers;
  static constexpr int kNumThreads = tile::kWarpgroupThreads;

  typename Config::Smem& smem;
  const AttentionForwardParams& params;
  int index;  // of this warpgroup: which 64 rows of a tile are its own
  tile::Pipeline<1> q_pipeline;
  tile::Pipeline<Config::kStages> k_pipeline, v_pipeline;

  __device__ __forceinline__ ForwardConsumer(typename Config::Smem& shared,
                                             const AttentionForwardParams& p, int i)
      : smem(shared),
        params(p),
        index(i),
        q_pipeline(shared.q_barriers),
        k_pipeline(shared.k_barriers),
        v_pipeline(shared.v_barriers) {
    // Nobody has had a turn before the first consumer's first one.
    if (index == kNumConsumers - 1) pass_turn();
  }

  __device__ __forceinline__ static int thread() {
    return static_cast<int>(threadIdx.x) % kNumThreads;
  }
  __device__ __forceinline__ static int warp() { return thread() / tile::kWarpSize; }

  // ---- turns at the tensor cores: one warpgroup waits, the one before it arrives ---------------

  __device__ __forceinline__ void wait_turn() const {
    ptx::bar_sync(Config::kTurnBarrier + index, 2 * kNumThreads);
  }
  __device__ __forceinline__ void pass_turn() const {
    const int next = index + 1 == kNumConsumers ? 0 : index + 1;
    ptx::bar_arrive(Config::kTurnBarrier + next, 2 * kNumThreads);
  }

  // ---- what wgmma must not find in shared memory as TMA left it -------------------------------

  // Rotates this warpgroup's queries in place, and keeps them for the backward pass where the call
  // asks for it. Rows first_row .. of the sequence; num_rows of them exist.
  __device__ __forceinline__ void prepare_queries(const ForwardTile& work, int first_row,
                                                  int num_rows) {
    if constexpr (std::is_same_v<Position, Rotary>) {
      const Sequence& s = work.sequence;
      auto& q_tile = smem.q[index];
      rotate_rows<kNumThreads>(T{}, q_tile, Rotation(params.rotary, work.kv_head, 1.0f),
                               query_positions(params, s), first_row, num_rows, thread());
      ptx::fence_proxy_async_shared();
      ptx::bar_sync(Config::kWarpgroupBarrier + index, kNumThreads);
      if (params.q_prepared == nullptr) return;
      const int64_t first = first_query_index(params, s, work.head) + first_row;
      const TargetRows to{static_cast<uint16_t*>(params.q_prepared) + first * params.head_dim,
                          params.head_dim};
      tile::store_rows<kNumThreads>(
          q_tile, [&](int row) { return to.at(row); }, num_rows, static_cast<int>(params.head_dim),
          thread());
    }
  }

  // A probability of 0 does not hide a NaN among values that no query sees. Consumers share the
  // work, which only the first and the last block of a sequence can need.
  __device__ __forceinline__ void clear_other_values(const KeyRange& valued_keys, int kv_block) {
    const int first_key = kv_block * BLOCK_KV;
    if (valued_keys.begin <= first_key && first_key + BLOCK_KV <= valued_keys.end) return;
    using VTile = typename Config::Smem::KvTile;
    VTile& v_tile = smem.v[v_pipeline.stage];
    v_pipeline.wait_full();
    for (int piece = static_cast<int>(threadIdx.x); piece < BLOCK_KV * VTile::kNumChunks;
         piece += Config::kNumConsumerThreads) {
      const int row = piece / VTile::kNumChunks, key = first_key + row;
      if (key < valued_keys.begin || key >= valued_keys.end) {
        v_tile.chunk_at(row, piece % VTile::kNumChunks) = uint4{};
      }
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(Config::kConsumersBarrier, Config::kNumConsumerThreads);
  }

  // ---- attention -------------------------------------------------------------------------------

  // Passes over the kv blocks, of which there is at least one. acc_o (64, HEAD_DIM).
  __device__ __forceinline__ void attend(float (&acc_o)[HEAD_DIM / 2], ForwardSm90Softmax& softmax,
                                         const ForwardTile& work, int warp_row) {
    const BlockRange& kv_blocks = work.kv_blocks;
    float acc_s[BLOCK_KV / 2];          // (64, BLOCK_KV)
    uint32_t p_frag[BLOCK_KV / 16][4];  // (64, BLOCK_KV)
    float row_scale[tile::kRowsPerThread];
    const auto softmax_block = [&](int kv_block) {
      if (kv_blocks.needs_mask(kv_block)) {
        mask_scores(acc_s, work.visible, warp_row, kv_block * BLOCK_KV);
      }
      softmax.update(acc_s, row_scale);
    };

    int kv_block = kv_blocks.end - 1;
    k_pipeline.wait_full();
    tile::multiply_a_bt_async(T{}, acc_s, smem.q[index], smem.k[k_pipeline.stage]);
    tile::wait_products<0>(acc_s);
    k_pipeline.release();
    softmax_block(kv_block);
    tile::as_a_fragments(T{}, p_frag, acc_s);

    for (; kv_block > kv_blocks.begin; --kv_block) {
      clear_other_values(work.valued_keys, kv_block);
      k_pipeline.wait_full();
      wait_turn();
      tile::multiply_a_bt_async(T{}, acc_s, smem.q[index], smem.k[k_pipeline.stage]);
      v_pipeline.wait_full();
      tile::multiply_a_b_async(T{}, acc_o, p_frag, smem.v[v_pipeline.stage]);
      pass_turn();
      tile::wait_products<1>(acc_s);
      k_pipeline.release();
      softmax_block(kv_block - 1);
      tile::finish_before_wait(acc_s);
      v_pipeline.wait_full();  // it is: ptxas moves the next wait up to the last branch before it
      tile::wait_products<0>(acc_o);
      v_pipeline.release();
      tile::as_a_fragments(T{}, p_frag, acc_s);
      scale_rows(acc_o, row_scale);
    }

    q_pipeline.release();  // the next tile's queries come under the rest of this one
    clear_other_values(work.valued_keys, kv_block);
    v_pipeline.wait_full();
    tile::multiply_a_b_async(T{}, acc_o, p_frag, smem.v[v_pipeline.stage]);
    tile::wait_products<0>(acc_o);
    v_pipeline.release();
  }

  // acc_o / row_sum, rounded once, and what store_row_state stores, of this warp's 16 rows;
  // num_rows of them exist.
  __device__ __forceinline__ void store(float (&acc_o)[HEAD_DIM / 2], ForwardSm90Softmax& softmax,
                                        const ForwardTile& work, int first_row, int num_rows) {
    float inverse[tile::kRowsPerThread];
    const int64_t first_index = first_query_index(params, work.sequence, work.head) + first_row;
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      const RowState state = softmax.finish(h, inverse[h]);
      const int row = tile::accumulator_row(h);
      if (tile::lane_index() % 4 == 0 && row < num_rows) {
        store_row_state(params, first_index + row, state, softmax.scale_log2[h]);
      }
    }
    scale_rows(acc_o, inverse);
    // From one lane, so that addresses in it are not worked out before the loop and kept through
    // it.
    const int out_index = tile::from_lane(index * (kNumThreads / tile::kWarpSize) + warp(), 0);
    auto& out_tile = smem.out[out_index];
    __syncwarp();  // all lanes have read the tile before
    tile::store_fragments(T{}, out_tile, 0, acc_o);
    __syncwarp();
    const TargetRows out = out_rows(params, work.sequence, work.head);
    tile::store_rows<tile::kWarpSize>(
        out_tile, [&](int row) { return out.at(first_row + row); }, num_rows,
        static_cast<int>(params.head_dim_v), tile::lane_index());
  }

  __device__ __forceinline__ void attend_tile(const ForwardTile& work) {
    const int first_row = index * tile::kWarpgroupRows, warp_row = first_row + warp() * 16;
    q_pipeline.wait_full();
    prepare_queries(work, work.first_row + first_row,
                    min(work.num_rows - first_row, tile::kWarpgroupRows));

    ForwardSm90Softmax softmax;
    softmax.reset();
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      const int query = work.first_row + warp_row + tile::accumulator_row(h);
      softmax.scale_log2[h] = query_scale(params, work.sequence, work.head, query) * kLog2E;
    }
    float acc_o[HEAD_DIM / 2] = {};
    if (work.kv_blocks.empty()) {
      q_pipeline.release();
    } else {
      attend(acc_o, softmax, work, warp_row);
    }
    store(acc_o, softmax, work, work.first_row + warp_row, work.num_rows - warp_row);
  }
};

}  // namespace drope::cuda
