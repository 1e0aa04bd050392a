// The running softmax of 16 rows in base 2, two rows a thread (FlashAttention-2, arXiv 2307.08691,
// algorithm 1), by the exponent of exponent.h.
#pragma once

#include <cfloat>

#include "cuda/attention/shared/exponent.h"
#include "cuda/attention/shared/sequence.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/accumulator.h"

namespace drope::cuda {

struct Softmax {
  // Of raw scores. It begins at the lowest of them, which a score may reach: its p is 1 then.
  // Whether a row has seen a key is told by its sum.
  float row_max[tile::kRowsPerThread];
  float row_sum[tile::kRowsPerThread];     // of this thread's columns only, until `finish`
  float scale_log2[tile::kRowsPerThread];  // scale_i log2(e) > 0

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      row_max[h] = -FLT_MAX;
      row_sum[h] = 0.0f;
    }
  }

  // The largest of row_max and the raw scores of row h.
  template <int kSize>
  __device__ __forceinline__ float max_with(const float (&acc_s)[kSize], int h) const {
    float largest = acc_s[2 * h];
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      largest = fmaxf(largest, acc_s[i / 2 * 4 + 2 * h + i % 2]);
    }
    return fmaxf(row_max[h], tile::quad_max(largest));
  }

  // Turns raw scores q'.k' into p; row_scale is what acc_o so far must be multiplied by.
  template <int kSize>
  __device__ __forceinline__ void update(float (&acc_s)[kSize],
                                         float (&row_scale)[tile::kRowsPerThread]) {
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      const float new_max = max_with(acc_s, h);
      row_scale[h] = ptx::ex2_approx_ftz(exponent(row_max[h], new_max, scale_log2[h]));
      row_max[h] = new_max;
      row_sum[h] *= row_scale[h];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int h = i / 2 % 2;
      acc_s[i] = ptx::ex2_approx_ftz(exponent(acc_s[i], row_max[h], scale_log2[h]));
      row_sum[h] += acc_s[i];
    }
  }

  // Row h, its sums over the quad. `inverse` is what makes acc_o the output: 0 in rows that saw no
  // key.
  __device__ __forceinline__ RowState finish(int h, float& inverse) const {
    const float sum = tile::quad_sum(row_sum[h]);
    inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    return {row_max[h], sum};
  }
};

// Multiplies the rows of an accumulator.
template <int kSize>
__device__ __forceinline__ void scale_rows(float (&acc)[kSize],
                                           const float (&factor)[tile::kRowsPerThread]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) acc[i] *= factor[i / 2 % 2];
}

// The logit scale of a row of q.
__device__ __forceinline__ float logit_scale(const AttentionParams& params, int64_t batch,
                                             int64_t head, int64_t row) {
  if (params.scale_rows == nullptr) return params.scale;
  return params.scale_rows[batch * params.stride_scale_batch + head * params.stride_scale_head +
                           row * params.stride_scale_row];
}

// Of a query of a sequence; queries past the last one repeat it.
__device__ __forceinline__ float query_scale(const AttentionParams& params, const Sequence& s,
                                             int64_t head, int query) {
  return logit_scale(params, s.batch, head, s.first_q + min(query, s.seqlen_q - 1));
}

// a, L and lse of a query; index: in (batch, num_heads_q, seqlen_q).
__device__ __forceinline__ void store_row_state(const AttentionForwardParams& params, int64_t index,
                                                const RowState& row, float scale_log2) {
  params.lse[index] = row.lse(scale_log2);
  if (params.softmax_state == nullptr) return;
  const int64_t num_rows = params.batch * params.num_heads_q * params.seqlen_q;
  params.softmax_state[index] = row.is_empty() ? 0.0f : row.row_max;
  params.softmax_state[num_rows + index] = row.log2_sum();
}

}  // namespace drope::cuda
