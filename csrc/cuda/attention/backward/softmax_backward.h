// From scores to dS (FlashAttention-2, arXiv 2307.08691, algorithm 2). acc_s is q'.k' of some keys
// and queries, acc_dp is dP and becomes ratio dS, where dS = p (dP - delta) and ratio the query's
// scale_log2 times ratio_of_scale_log2 (workspace.h).
#pragma once

#include "cuda/attention/shared/exponent.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/accumulator.h"
#include "cuda/workspace.h"

namespace drope::cuda {

__device__ __forceinline__ float probability(float score, const QueryTerms& query) {
  return ptx::ex2_approx_ftz(exponent(score, query.row_max, query.scale_log2, query.log2_sum));
}

__device__ __forceinline__ float score_gradient(float p, float dp, float delta, float ratio) {
  return p * (dp - delta) * ratio;
}

// Rows are queries; terms: of this thread's two.
template <int kSize>
__device__ __forceinline__ void softmax_backward(const float (&acc_s)[kSize],
                                                 float (&acc_dp)[kSize],
                                                 const QueryTerms (&terms)[tile::kRowsPerThread],
                                                 float ratio_of_scale_log2) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const QueryTerms& query = terms[i / 2 % 2];
    acc_dp[i] = score_gradient(probability(acc_s[i], query), acc_dp[i], query.delta,
                               query.scale_log2 * ratio_of_scale_log2);
  }
}

// Transposed: rows are keys, columns queries; terms[c]: of column c. acc_s becomes p.
template <int kM16, int kSize>
__device__ __forceinline__ void softmax_backward_transposed(float (&acc_s)[kM16][kSize],
                                                            float (&acc_dp)[kM16][kSize],
                                                            const QueryTerms* terms,
                                                            float ratio_of_scale_log2) {
#pragma unroll
  for (int j = 0; j < kSize / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const QueryTerms query = terms[tile::accumulator_col(j, e)];
      const float ratio = query.scale_log2 * ratio_of_scale_log2;
#pragma unroll
      for (int m = 0; m < kM16; ++m) {
#pragma unroll
        for (int h = 0; h < tile::kRowsPerThread; ++h) {
          const int i = 4 * j + 2 * h + e;
          acc_s[m][i] = probability(acc_s[m][i], query);
          acc_dp[m][i] = score_gradient(acc_s[m][i], acc_dp[m][i], query.delta, ratio);
        }
      }
    }
  }
}

}  // namespace drope::cuda
