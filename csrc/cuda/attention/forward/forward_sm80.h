// Attention forward with cp.async, ldmatrix and mma.sync (FlashAttention-2, arXiv 2307.08691,
// algorithm 1). A block owns BLOCK_Q queries of one head and passes over the kv blocks that they
// see; k and v take turns in shared memory, so that each is copied while the other is multiplied.
#pragma once

#include <type_traits>

#include "cuda/attention/forward/forward_sm80_config.h"
#include "cuda/attention/shared/block_range.h"
#include "cuda/attention/shared/head_rows.h"
#include "cuda/attention/shared/mask.h"
#include "cuda/attention/shared/rotary.h"
#include "cuda/attention/shared/softmax.h"
#include "cuda/attention/shared/work_tile.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/tile/copy_rows.h"
#include "cuda/tile/store_accumulator.h"
#include "cuda/tile/warp_mma.h"

namespace drope::cuda {

template <class Config>
__device__ __forceinline__ ForwardPlan plan_forward(const AttentionForwardParams& params,
                                                    const TileSchedule& schedule, int64_t index) {
  const WorkTile work = query_tile<Config::BLOCK_Q>(params, schedule, index);
  const Sequence& s = work.sequence;
  const int kv_head = work.head / static_cast<int>(params.num_heads_q / params.num_heads_kv);
  const Visibility visible(params.mask, s);
  const TileVisibility of_tile(visible, work.first_row, work.num_rows);
  // Keys that no query of the tile sees may hold anything, NaN too: they are zeros to the tile.
  const KeyRange keys = of_tile.keys;
  return {work,
          kv_head,
          visible.kv_blocks<Config::BLOCK_KV>(work.first_row, work.num_rows),
          of_tile,
          query_rows(params, s, work.head).window(0, s.seqlen_q),
          key_rows(params, s, kv_head).window(keys.begin, keys.end),
          value_rows(params, s, kv_head).window(keys.begin, keys.end)};
}

// q in shared memory, rotated, and kept for the backward pass where the call asks for it.
template <class Config, class T>
__device__ __forceinline__ void prepare_queries(const AttentionForwardParams& params,
                                                const WorkTile& work, int kv_head,
                                                typename Config::Smem& smem) {
  const int thread = static_cast<int>(threadIdx.x);
  rotate_rows<Config::kNumThreads>(T{}, smem.q, Rotation(params.rotary, kv_head, 1.0f),
                                   query_positions(params, work.sequence), work.first_row,
                                   work.num_rows, thread);
  __syncthreads();
  if (params.q_prepared == nullptr) return;
  const int64_t first = first_query_index(params, work.sequence, work.head) + work.first_row;
  const TargetRows to{static_cast<uint16_t*>(params.q_prepared) + first * params.head_dim,
                      params.head_dim};
  tile::store_rows<Config::kNumThreads>(
      smem.q, [&](int row) { return to.at(row); }, work.num_rows, static_cast<int>(params.head_dim),
      thread);
}

// acc_o / row_sum, rounded once, and what store_row_state stores, of a warp's queries: those from
// warp_row of the tile on.
template <class T, int kM16, int kSize, class Tile>
__device__ __forceinline__ void store_results(T, const AttentionForwardParams& params,
                                              const WorkTile& work, int warp_row,
                                              float (&acc_o)[kM16][kSize], Softmax (&softmax)[kM16],
                                              Tile& out_smem) {
  const int first_row = work.first_row + warp_row, num_rows = work.num_rows - warp_row;
  const int64_t first_index = first_query_index(params, work.sequence, work.head) + first_row;
#pragma unroll
  for (int m = 0; m < kM16; ++m) {
    float inverse[tile::kRowsPerThread];
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      const RowState state = softmax[m].finish(h, inverse[h]);
      const int row = 16 * m + tile::accumulator_row(h);
      if (tile::lane_index() % 4 == 0 && row < num_rows) {
        store_row_state(params, first_index + row, state, softmax[m].scale_log2[h]);
      }
    }
    scale_rows(acc_o[m], inverse);
    tile::store_accumulator(T{}, out_smem, 16 * m, acc_o[m]);
  }
  __syncwarp();
  const TargetRows out = out_rows(params, work.sequence, work.head);
  tile::store_rows<tile::kWarpSize>(
      out_smem, [&](int row) { return out.at(first_row + row); }, num_rows,
      static_cast<int>(params.head_dim_v), tile::lane_index());
}

template <class Config, class T, class Position>
__global__ void __launch_bounds__(Config::kNumThreads, Config::kBlocksPerSm)
    forward_sm80_kernel(const __grid_constant__ AttentionForwardParams params,
                        const __grid_constant__ TileSchedule schedule) {
  constexpr int HEAD_DIM = Config::HEAD_DIM, BLOCK_KV = Config::BLOCK_KV, kM16 = Config::kM16;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::Smem*>(smem_bytes);
  const int warp = static_cast<int>(threadIdx.x / tile::kWarpSize);
  const int warp_row = warp * Config::kRowsPerWarp;

  const ForwardPlan& plan = smem.plan;
  if (warp == 0) {
    const ForwardPlan computed = plan_forward<Config>(params, schedule, blockIdx.x);
    if (tile::lane_index() == 0) smem.plan = computed;
  }
  __syncthreads();
  const WorkTile& work = plan.work;
  if (work.num_rows == 0) return;

  const int head_dim = static_cast<int>(params.head_dim);
  const int head_dim_v = static_cast<int>(params.head_dim_v);
  const auto copy = [](auto& to_smem, tile::RowWindow rows, int first_row, int channels) {
    tile::copy_rows_async<Config::kNumThreads>(to_smem, rows, first_row, channels);
    ptx::cp_async_commit_group();
  };
  copy(smem.q, plan.q, work.first_row, head_dim);
  if (!plan.kv_blocks.empty()) {
    copy(smem.k, plan.k, plan.kv_blocks.begin * BLOCK_KV, head_dim);
  } else {
    ptx::cp_async_commit_group();  // of nothing: the wait for q counts groups
  }
  if constexpr (std::is_same_v<Position, Rotary>) {
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    prepare_queries<Config, T>(params, work, plan.kv_head, smem);
  }

  float acc_o[kM16][HEAD_DIM / 2] = {};
  Softmax softmax[kM16];
#pragma unroll
  for (int m = 0; m < kM16; ++m) {
    softmax[m].reset();
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      const int query = work.first_row + warp_row + 16 * m + tile::accumulator_row(h);
      softmax[m].scale_log2[h] = query_scale(params, work.sequence, work.head, query) * kLog2E;
    }
  }

  const int end = plan.kv_blocks.end;
  for (int kv_block = plan.kv_blocks.begin; kv_block < end; ++kv_block) {
    tile::wait_for_copies();  // k is there, and all warps have left v
    copy(smem.v, plan.v, kv_block * BLOCK_KV, head_dim_v);
    float acc_s[kM16][BLOCK_KV / 2] = {};
    tile::multiply_a_bt<HEAD_DIM / 16>(T{}, acc_s, smem.q, warp_row, smem.k, 0);
    if (plan.kv_blocks.needs_mask(kv_block)) {
#pragma unroll
      for (int m = 0; m < kM16; ++m) {
        mask_scores(acc_s[m], plan.visible, warp_row + 16 * m, kv_block * BLOCK_KV);
      }
    }

    tile::wait_for_copies();  // v is there, and all warps have left k
    if (kv_block + 1 < end) copy(smem.k, plan.k, (kv_block + 1) * BLOCK_KV, head_dim);
#pragma unroll
    for (int m = 0; m < kM16; ++m) {
      float row_scale[tile::kRowsPerThread];
      softmax[m].update(acc_s[m], row_scale);
      scale_rows(acc_o[m], row_scale);
    }
    tile::multiply_p_b(T{}, acc_o, acc_s, smem.v);
  }

  tile::wait_for_copies();  // all warps have left q, which a tile without keys has not even waited
                            // for
  store_results(T{}, params, work, warp_row, acc_o, softmax, smem.out[warp]);
}

}  // namespace drope::cuda
