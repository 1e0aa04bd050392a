// Attention backward with cp.async, ldmatrix and mma.sync (FlashAttention-2, arXiv 2307.08691,
// algorithm 2): dk and dv, and the sums of dq. A block owns BLOCK_KV keys of one kv head and passes
// over the queries of all heads of its group that see them, so that dk and dv never leave
// registers.
#pragma once

#include "cuda/attention/backward/backward_rows.h"
#include "cuda/attention/backward/backward_sm80_config.h"
#include "cuda/attention/backward/grad_q.h"
#include "cuda/attention/backward/grad_rows.h"
#include "cuda/attention/backward/softmax_backward.h"
#include "cuda/attention/shared/mask.h"
#include "cuda/attention/shared/work_tile.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/tile/smem_tile.h"
#include "cuda/tile/store_accumulator.h"
#include "cuda/tile/warp_mma_transposed.h"

namespace drope::cuda {

template <class Config>
struct BackwardSmem {
  static constexpr int kGradSCols = Config::BLOCK_Q < 32 ? 32 : Config::BLOCK_Q;

  tile::SmemTile<Config::BLOCK_KV, Config::HEAD_DIM> k, v;
  tile::SmemTile<Config::BLOCK_Q, Config::HEAD_DIM> q, grad_out;
  tile::SmemTile<Config::BLOCK_KV, kGradSCols> grad_s;  // ratio dS, (keys, queries)
  QueryTerms terms[Config::BLOCK_Q];
  RowRange seeing[Config::BLOCK_KV];  // the queries that see each key
};

template <class Config>
struct BackwardStorage {
  union {
    BackwardSmem<Config> loop;
    tile::FloatTile<Config::BLOCK_KV, Config::HEAD_DIM> grad;  // dv, then dk, on their way out
  };
  WorkTile work;  // once more for the way out: during the loop registers are too few
};

// The block of queries that the loop is at, and where its head's queries lie. Pointers that advance
// take fewer registers than what they are computed from.
struct QueryWalk {
  int q_block;
  const uint16_t *q, *grad_out;  // of query 0 of the sequence, as are the others
  int64_t padded_row;            // in the workspace

  template <int BLOCK_Q>
  static __device__ __forceinline__ QueryWalk begin(const AttentionBackwardParams& p,
                                                    const BackwardWorkspace& workspace,
                                                    const Sequence& s, int head, int q_block) {
    return {q_block, query_rows(p, s, head).data, grad_out_rows(p, s, head).data,
            first_padded_index<BLOCK_Q>(p, workspace, s, head)};
  }

  // The q blocks of a head, then those of the next one.
  template <int BLOCK_Q>
  __device__ __forceinline__ void advance(const AttentionBackwardParams& p,
                                          const BackwardWorkspace& workspace,
                                          const BlockRange& q_blocks) {
    if (++q_block < q_blocks.end) return;
    q_block = q_blocks.begin;
    q += p.stride_q_head;
    grad_out += p.stride_grad_out_head;
    padded_row += workspace.num_q_blocks * BLOCK_Q;
  }
};

// Accumulators of a whole block, out through shared memory.
template <class Config, class T, int kSize, class RestoreRow>
__device__ __forceinline__ void store_grad(
    T, tile::FloatTile<Config::BLOCK_KV, Config::HEAD_DIM>& sums,
    const float (&acc)[Config::kM16][kSize], float factor, int warp_row, int warp_col,
    const TargetRows& to, int num_rows, int64_t num_channels, const RestoreRow& restore_row) {
#pragma unroll
  for (int m = 0; m < Config::kM16; ++m) {
    tile::store_accumulator(sums, warp_row + 16 * m, warp_col, acc[m], factor);
  }
  __syncthreads();
  store_grad_rows<Config::kNumThreads>(T{}, sums, to, num_rows, num_channels, restore_row);
}

template <class Config, class T, class Position>
__global__ void __launch_bounds__(Config::kNumThreads, Config::kBlocksPerSm)
    backward_sm80_kernel(const __grid_constant__ AttentionBackwardParams params,
                         const __grid_constant__ BackwardWorkspace workspace,
                         const __grid_constant__ TileSchedule schedule) {
  constexpr int BLOCK_Q = Config::BLOCK_Q, BLOCK_KV = Config::BLOCK_KV;
  constexpr int kM16 = Config::kM16, kSlice = Config::kSlice;
  constexpr int kNumThreads = Config::kNumThreads, kSteps = Config::HEAD_DIM / 16;
  static_assert(sizeof(BackwardStorage<Config>) <= 99 * 1024);
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& storage = *reinterpret_cast<BackwardStorage<Config>*>(smem_bytes);
  BackwardSmem<Config>& smem = storage.loop;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int warp_row = warp / Config::kWarpsPerKeys * Config::kRowsPerWarp;  // its first key
  const int warp_col = warp % Config::kWarpsPerKeys * Config::kColsPerWarp;  // of dk and dv

  const WorkTile work = key_tile<BLOCK_KV>(params, schedule, blockIdx.x);
  if (work.num_rows == 0) return;
  const Sequence& s = work.sequence;
  const int kv_head = work.head;
  const int group = static_cast<int>(params.num_heads_q / params.num_heads_kv);
  const Visibility visible(params.mask, s);
  const BlockRange q_blocks = visible.q_blocks<BLOCK_Q>(work.first_row, BLOCK_KV);
  const RowRange queries = visible.seeing_queries();

  const auto copy_queries = [&](const QueryWalk& at) {
    const int first = at.q_block * BLOCK_Q;
    copy_valid_rows<kNumThreads>(smem.q, SourceRows{at.q, params.stride_q_row}, first, queries,
                                 params.head_dim);
    copy_valid_rows<kNumThreads>(smem.grad_out, SourceRows{at.grad_out, params.stride_grad_out_row},
                                 first, queries, params.head_dim_v);
    if (thread < BLOCK_Q) {
      ptx::cp_async_16(ptx::smem_address(&smem.terms[thread]),
                       workspace.terms + at.padded_row + first + thread, sizeof(QueryTerms));
    }
    ptx::cp_async_commit_group();
  };

  QueryWalk at = QueryWalk::begin<BLOCK_Q>(params, workspace, s, kv_head * group, q_blocks.begin);
  int num_left = group * (q_blocks.end - q_blocks.begin);
  if (num_left > 0) {
    const KeyRange seen = visible.keys_of_rows(0, s.seqlen_q);
    const RowRange keys{seen.begin, seen.end};
    copy_valid_rows<kNumThreads>(smem.k, key_rows(params, s, kv_head), work.first_row, keys,
                                 params.head_dim);
    copy_valid_rows<kNumThreads>(smem.v, value_rows(params, s, kv_head), work.first_row, keys,
                                 params.head_dim_v);
    copy_queries(at);
    if (thread < BLOCK_KV) smem.seeing[thread] = visible.queries_of(work.first_row + thread);
  }
  if (thread == 0) storage.work = work;
  tile::wait_for_copies();

  float acc_dk[kM16][Config::kColsPerWarp / 2] = {}, acc_dv[kM16][Config::kColsPerWarp / 2] = {};
  for (; num_left > 0; --num_left) {
#pragma unroll 1  // unrolled, the slices' addresses alone would fill the registers
    for (int slice = 0; slice < BLOCK_Q; slice += kSlice) {
      float acc_s[kM16][kSlice / 2] = {}, acc_dp[kM16][kSlice / 2] = {};
      tile::multiply_a_bt<kSteps>(T{}, acc_s, smem.k, warp_row, smem.q, slice);
      tile::multiply_a_bt<kSteps>(T{}, acc_dp, smem.v, warp_row, smem.grad_out, slice);
      if (q_blocks.needs_mask(at.q_block)) {
#pragma unroll
        for (int m = 0; m < kM16; ++m) {
          mask_transposed_scores(acc_s[m], smem.seeing + warp_row + 16 * m,
                                 at.q_block * BLOCK_Q + slice);
        }
      }
      softmax_backward_transposed(acc_s, acc_dp, smem.terms + slice, workspace.ratio_of_scale_log2);

      tile::multiply_p_b(T{}, acc_dv, acc_s, smem.grad_out, slice, warp_col / 16);
      tile::multiply_p_b(T{}, acc_dk, acc_dp, smem.q, slice, warp_col / 16);
      if (warp_col == 0) {  // the warps that share keys have the same dS
#pragma unroll
        for (int m = 0; m < kM16; ++m) {
          tile::store_accumulator(T{}, smem.grad_s, warp_row + 16 * m, acc_dp[m], slice);
        }
      }
    }
    __syncthreads();  // dS is complete, and all warps have left q, dO and their terms

    const int64_t padded_row = at.padded_row + static_cast<int64_t>(at.q_block) * BLOCK_Q;
    at.advance<BLOCK_Q>(params, workspace, q_blocks);
    if (num_left > 1) copy_queries(at);
    if (!workspace.deterministic) {
      add_grad_q<Config>(T{}, workspace.grad_q_sum + padded_row * Config::HEAD_DIM, smem.grad_s,
                         smem.k);
    }
    tile::wait_for_copies();  // the next q block is there, and all warps have left dS
  }

  const WorkTile done = storage.work;
  store_grad<Config>(T{}, storage.grad, acc_dv, 1.0f, warp_row, warp_col,
                     grad_v_rows(params, done.sequence, done.head, done.first_row), done.num_rows,
                     params.head_dim_v, RestoreNothing{});
  __syncthreads();
  store_grad<Config>(T{}, storage.grad, acc_dk, grad_factor(params), warp_row, warp_col,
                     grad_k_rows(params, done.sequence, done.head, done.first_row), done.num_rows,
                     params.head_dim,
                     restore_keys<Position>(params, done.sequence, done.head, done.first_row));
}

}  // namespace drope::cuda
