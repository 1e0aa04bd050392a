// The results of a decode block: its warps' parts, merged in shared memory, and stored as out and
// lse, or as one part of the splits: out and state.
#pragma once

#include "cuda/attention/decode/decode_work.h"
#include "cuda/attention/decode/merge.h"
#include "cuda/attention/shared/softmax.h"
#include "cuda/tile/accumulator.h"
#include "cuda/tile/convert.h"

namespace drope::cuda {

__device__ __forceinline__ float scale_log2_of(const AttentionDecodeParams& params,
                                               const DecodeWork& work, int row) {
  return logit_scale(params, work.rows.batch, work.rows.head(row), work.rows.query(row)) * kLog2E;
}

__device__ __forceinline__ void store_state(const AttentionDecodeParams& params,
                                            const DecodeWork& work, int row, const RowState& state,
                                            float scale_log2) {
  const int64_t index = work.rows.index(params, row);
  if (params.num_splits == 1) {
    params.lse[index] = state.lse(scale_log2);
    return;
  }
  const int64_t num_rows = params.batch * params.num_heads_q * params.seqlen_q;
  float* const part_max = params.partial_state + work.split * num_rows;
  part_max[index] = state.row_max;
  part_max[params.num_splits * num_rows + index] = state.row_sum;
}

// Eight channels of a row's result: rounded into out, or as they are into the block's part.
template <class T>
__device__ __forceinline__ void store_chunk(T, const AttentionDecodeParams& params,
                                            const DecodeWork& work, int row, int chunk,
                                            const float (&x)[8]) {
  if (params.num_splits == 1) {
    *reinterpret_cast<uint4*>(work.rows.out(params, row) + 8 * chunk) = tile::pack_chunk(T{}, x);
    return;
  }
  const int64_t num_rows = params.batch * params.num_heads_q * params.seqlen_q;
  const int64_t part_row = work.split * num_rows + work.rows.index(params, row);
  auto* const to =
      reinterpret_cast<float4*>(params.partial_out + part_row * params.head_dim_v + 8 * chunk);
  to[0] = make_float4(x[0], x[1], x[2], x[3]);
  to[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// The same result for every row of the block: 0 where row_sum is, else NaN. A part without keys is
// its state alone.
template <class Config, class T>
__device__ __forceinline__ void store_everywhere(T, const AttentionDecodeParams& params,
                                                 const DecodeWork& work, float row_sum) {
  const int num_chunks = static_cast<int>(params.head_dim_v / tile::kChunkCols);
  const float x[8] = {row_sum, row_sum, row_sum, row_sum, row_sum, row_sum, row_sum, row_sum};
  const int thread = static_cast<int>(threadIdx.x);
  for (int row = thread; row < work.rows.num_rows; row += Config::kNumThreads) {
    store_state(params, work, row, {-FLT_MAX, row_sum}, scale_log2_of(params, work, row));
  }
  if (params.num_splits > 1 && row_sum == 0.0f) return;
#pragma unroll 1
  for (int item = thread; item < work.rows.num_rows * num_chunks; item += Config::kNumThreads) {
    store_chunk(T{}, params, work, item / num_chunks, item % num_chunks, x);
  }
}

// What the warps left in shared memory, merged.
template <class Config, class T>
__device__ __forceinline__ void store_merged(T, const AttentionDecodeParams& params,
                                             const DecodeWork& work,
                                             const typename Config::Parts& parts) {
  const int num_chunks = static_cast<int>(params.head_dim_v / tile::kChunkCols);
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < work.rows.num_rows * num_chunks;
       item += Config::kNumThreads) {
    const int row = item / num_chunks, chunk = item % num_chunks;
    const float scale_log2 = scale_log2_of(params, work, row);
    const RowState whole =
        merged_state(Config::kNumWarps, [&](int w) { return parts.state[w][row]; }, scale_log2);
    const float inverse = whole.is_empty() ? 0.0f : 1.0f / whole.row_sum;
    float acc_o[8] = {};
#pragma unroll
    for (int w = 0; w < Config::kNumWarps; ++w) {
      const float weight = merge_weight(parts.state[w][row], whole.row_max, scale_log2) * inverse;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        acc_o[i] = fmaf(weight, parts.out[w][row][8 * chunk + i], acc_o[i]);
      }
    }
    store_chunk(T{}, params, work, row, chunk, acc_o);
    if (chunk == 0) store_state(params, work, row, whole, scale_log2);
  }
}

// One warp's results, normalised, to where all threads find them.
template <class Config>
__device__ __forceinline__ void leave_part(typename Config::Parts& parts, int warp, int m,
                                           float (&acc_o)[Config::HEAD_DIM / 2], Softmax& softmax) {
  float inverse[tile::kRowsPerThread];
#pragma unroll
  for (int h = 0; h < tile::kRowsPerThread; ++h) {
    const RowState state = softmax.finish(h, inverse[h]);
    const bool is_first_of_quad = tile::lane_index() % 4 == 0;
    if (is_first_of_quad) parts.state[warp][16 * m + tile::accumulator_row(h)] = state;
  }
  scale_rows(acc_o, inverse);
#pragma unroll
  for (int i = 0; i < Config::HEAD_DIM / 2; i += 2) {
    const int row = 16 * m + tile::accumulator_row(i / 2 % 2);
    float* const to = &parts.out[warp][row][tile::accumulator_col(i / 4, 0)];
    *reinterpret_cast<float2*>(to) = make_float2(acc_o[i], acc_o[i + 1]);
  }
}

}  // namespace drope::cuda
