// The terms of each query that the backward pass needs besides its channels, delta above all:
// delta_i = rowsum(dO_i * O_i) - dlse_i is subtracted from dP (FlashAttention-2, arXiv 2307.08691,
// algorithm 2).
#pragma once

#include "cuda/attention/backward/backward_rows.h"
#include "cuda/attention/shared/scalar.h"
#include "cuda/attention/shared/softmax.h"
#include "cuda/attention/shared/work_tile.h"
#include "cuda/tile/accumulator.h"
#include "cuda/tile/convert.h"

namespace drope::cuda {

inline constexpr int kDeltaBlock = 64, kDeltaLanesPerRow = 8;
inline constexpr int kDeltaThreads = kDeltaBlock * kDeltaLanesPerRow;

// The dot product of eight channels.
template <class T>
__device__ __forceinline__ float dot_of_chunk(T, const uint16_t* a, const uint16_t* b) {
  const uint4 x = *reinterpret_cast<const uint4*>(a), y = *reinterpret_cast<const uint4*>(b);
  const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const tile::FloatPair p = tile::unpack(T{}, xs[i]), q = tile::unpack(T{}, ys[i]);
    sum = fmaf(p.high, q.high, fmaf(p.low, q.low, sum));
  }
  return sum;
}

// This lane's share of rowsum(dO * O).
template <class T>
__device__ __forceinline__ float partial_delta(T, const AttentionBackwardParams& p,
                                               const Sequence& s, int head, int query) {
  const uint16_t* const out = out_rows(p, s, head).at(query);
  const uint16_t* const grad_out = grad_out_rows(p, s, head).at(query);
  float sum = 0.0f;
  for (int64_t channel = threadIdx.x % kDeltaLanesPerRow * tile::kChunkCols; channel < p.head_dim_v;
       channel += kDeltaLanesPerRow * tile::kChunkCols) {
    sum += dot_of_chunk(T{}, out + channel, grad_out + channel);
  }
  return sum;
}

// A block writes the terms of kDeltaBlock queries, and of the rows that fill up the last BLOCK_Q.
template <int BLOCK_Q, class T>
__global__ void __launch_bounds__(kDeltaThreads)
    backward_delta_kernel(const __grid_constant__ AttentionBackwardParams params,
                          const __grid_constant__ BackwardWorkspace workspace,
                          const __grid_constant__ TileSchedule schedule) {
  static_assert(kDeltaBlock % BLOCK_Q == 0);
  const WorkTile work = query_tile<kDeltaBlock>(params, schedule, blockIdx.x);
  if (work.num_rows == 0) return;
  const Sequence& s = work.sequence;
  const RowRange seeing = Visibility(params.mask, s).seeing_queries();
  const int query = work.first_row + static_cast<int>(threadIdx.x) / kDeltaLanesPerRow;
  const bool sees = query >= seeing.begin && query < seeing.end;

  // What belongs to a query that sees no key may be anything, NaN too: it is not read.
  const float sum =
      tile::sum_of_eight_lanes(sees ? partial_delta(T{}, params, s, work.head, query) : 0.0f);
  const int num_padded = (s.seqlen_q + BLOCK_Q - 1) / BLOCK_Q * BLOCK_Q;
  if (threadIdx.x % kDeltaLanesPerRow != 0 || query >= num_padded) return;
  QueryTerms terms{1.0f, 0.0f, infinity(), 0.0f};
  if (sees) {
    const int64_t index = first_query_index(params, s, work.head) + query;
    const float grad_lse = params.grad_lse != nullptr ? params.grad_lse[index] : 0.0f;
    const int64_t num_rows = params.batch * params.num_heads_q * params.seqlen_q;
    terms = {query_scale(params, s, work.head, query) * kLog2E, params.softmax_state[index],
             params.softmax_state[num_rows + index], sum - grad_lse};
  }
  workspace.terms[first_padded_index<BLOCK_Q>(params, workspace, s, work.head) + query] = terms;
}

}  // namespace drope::cuda
