// dq of deterministic calls: a block owns kDqBlockQ queries of one head and passes over the keys
// that they see, computing scores and dP once more, so that every sum is formed by one thread in
// one order.
#pragma once

#include "cuda/attention/backward/backward_rows.h"
#include "cuda/attention/backward/backward_sm80_config.h"
#include "cuda/attention/backward/grad_rows.h"
#include "cuda/attention/backward/softmax_backward.h"
#include "cuda/attention/shared/mask.h"
#include "cuda/attention/shared/work_tile.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/tile/smem_tile.h"
#include "cuda/tile/warp_mma.h"

namespace drope::cuda {

template <class Config>
struct DqSmem {
  tile::SmemTile<Config::kDqBlockQ, Config::HEAD_DIM> q, grad_out;
  tile::SmemTile<Config::kDqBlockKv, Config::HEAD_DIM> k, v;
};

// After the loop the same memory takes dq on its way out.
template <class Config>
union DqStorage {
  DqSmem<Config> loop;
  tile::FloatTile<Config::kDqBlockQ, Config::HEAD_DIM> grad;
};

template <class Config, class T, class Position>
__global__ void __launch_bounds__(Config::kDqNumThreads, Config::kDqBlocksPerSm)
    backward_sm80_dq_kernel(const __grid_constant__ AttentionBackwardParams params,
                            const __grid_constant__ BackwardWorkspace workspace,
                            const __grid_constant__ TileSchedule schedule) {
  constexpr int BLOCK_Q = Config::kDqBlockQ, BLOCK_KV = Config::kDqBlockKv;
  constexpr int HEAD_DIM = Config::HEAD_DIM, kNumThreads = Config::kDqNumThreads;
  static_assert(sizeof(DqStorage<Config>) <= 99 * 1024);
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& storage = *reinterpret_cast<DqStorage<Config>*>(smem_bytes);
  DqSmem<Config>& smem = storage.loop;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;

  const WorkTile work = query_tile<BLOCK_Q>(params, schedule, blockIdx.x);
  if (work.num_rows == 0) return;
  const Sequence& s = work.sequence;
  const int kv_head = work.head / static_cast<int>(params.num_heads_q / params.num_heads_kv);
  const Visibility visible(params.mask, s);
  const BlockRange kv_blocks = visible.kv_blocks<BLOCK_KV>(work.first_row, work.num_rows);
  const RowRange queries = visible.seeing_queries();
  const KeyRange seen = visible.keys_of_rows(work.first_row, work.num_rows);
  const RowRange keys{seen.begin, seen.end};

  QueryTerms terms[tile::kRowsPerThread];
  const int64_t first_index =
      first_padded_index<Config::BLOCK_Q>(params, workspace, s, work.head) + work.first_row;
#pragma unroll
  for (int h = 0; h < tile::kRowsPerThread; ++h) {
    const int row = min(warp_row + tile::accumulator_row(h), work.num_rows - 1);
    terms[h] = workspace.terms[first_index + row];
  }
  if (!kv_blocks.empty()) {
    copy_valid_rows<kNumThreads>(smem.q, query_rows(params, s, work.head), work.first_row, queries,
                                 params.head_dim);
    copy_valid_rows<kNumThreads>(smem.grad_out, grad_out_rows(params, s, work.head), work.first_row,
                                 queries, params.head_dim_v);
  }

  float acc_dq[1][HEAD_DIM / 2] = {};
  for (int kv_block = kv_blocks.begin; kv_block < kv_blocks.end; ++kv_block) {
    copy_valid_rows<kNumThreads>(smem.k, key_rows(params, s, kv_head), kv_block * BLOCK_KV, keys,
                                 params.head_dim);
    copy_valid_rows<kNumThreads>(smem.v, value_rows(params, s, kv_head), kv_block * BLOCK_KV, keys,
                                 params.head_dim_v);
    ptx::cp_async_commit_group();
    tile::wait_for_copies();

    float acc_s[1][BLOCK_KV / 2] = {}, acc_dp[1][BLOCK_KV / 2] = {};
    tile::multiply_a_bt<HEAD_DIM / 16>(T{}, acc_s, smem.q, warp_row, smem.k, 0);
    tile::multiply_a_bt<HEAD_DIM / 16>(T{}, acc_dp, smem.grad_out, warp_row, smem.v, 0);
    if (kv_blocks.needs_mask(kv_block)) {
      mask_scores(acc_s[0], visible, work.first_row + warp_row, kv_block * BLOCK_KV);
    }
    softmax_backward(acc_s[0], acc_dp[0], terms, workspace.ratio_of_scale_log2);
    tile::multiply_p_b(T{}, acc_dq, acc_dp, smem.k);
    __syncthreads();  // all warps have left k and v
  }

  tile::store_accumulator(storage.grad, warp_row, 0, acc_dq[0], grad_factor(params));
  __syncthreads();
  store_grad_q<Config::BLOCK_Q, kNumThreads, Position>(T{}, storage.grad, params, workspace, work);
}

}  // namespace drope::cuda
