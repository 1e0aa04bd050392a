// The running softmax of 16 rows in base 2, two rows a thread (FlashAttention-2, arXiv 2307.08691,
// algorithm 1). p_ij = exp2(scale_log2_i acc_ij - row_max_i); row_max is in units of log2.
#pragma once

#include "cuda/attention/shared/scalar.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/accumulator.h"

namespace drope::cuda {

// The row_max of a row that has seen no key: below every score, and finite, as -inf - -inf is NaN.
inline constexpr float kNoScore = -0x1p127f;

struct Softmax {
  float row_max[tile::kRowsPerThread], row_sum[tile::kRowsPerThread];
  float scale_log2[tile::kRowsPerThread];  // scale_i log2(e) > 0

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      row_max[h] = kNoScore;
      row_sum[h] = 0.0f;  // of this thread's columns only, until `finish`
    }
  }

  // Turns raw scores q'.k' into p; row_scale is what acc_o so far must be multiplied by.
  template <int kSize>
  __device__ __forceinline__ void update(float (&acc_s)[kSize],
                                         float (&row_scale)[tile::kRowsPerThread]) {
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      float largest = acc_s[2 * h];
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {
        largest = fmaxf(largest, acc_s[i / 2 * 4 + 2 * h + i % 2]);
      }
      const float new_max = fmaxf(row_max[h], tile::quad_max(largest) * scale_log2[h]);
      row_scale[h] = ptx::ex2_approx_ftz(row_max[h] - new_max);
      row_max[h] = new_max;
      row_sum[h] *= row_scale[h];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int h = i / 2 % 2;
      acc_s[i] = ptx::ex2_approx_ftz(fmaf(acc_s[i], scale_log2[h], -row_max[h]));
      row_sum[h] += acc_s[i];
    }
  }

  // Sums rows over their quads. `inverse` is 1 / row_sum, 0 in rows that saw no key.
  __device__ __forceinline__ void finish(float (&inverse)[tile::kRowsPerThread],
                                         float (&lse)[tile::kRowsPerThread]) {
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      const float sum = tile::quad_sum(row_sum[h]);
      const bool empty = sum == 0.0f;  // the largest score alone gives 1
      inverse[h] = empty ? 0.0f : 1.0f / sum;
      lse[h] = empty ? -infinity() : (row_max[h] + __log2f(sum)) * kLn2;
    }
  }
};

// Multiplies the rows of an accumulator.
template <int kSize>
__device__ __forceinline__ void scale_rows(float (&acc)[kSize],
                                           const float (&factor)[tile::kRowsPerThread]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) acc[i] *= factor[i / 2 % 2];
}

// The logit scale of a query; rows past the last one repeat it.
__device__ __forceinline__ float query_scale(const AttentionParams& params, const Sequence& s,
                                             int64_t head, int query) {
  if (params.scale_rows == nullptr) return params.scale;
  const int64_t row = s.first_q + min(query, s.seqlen_q - 1);
  return params.scale_rows[s.batch * params.stride_scale_batch + head * params.stride_scale_head +
                           row * params.stride_scale_row];
}

}  // namespace drope::cuda
