// What all passes agree on about the softmax of a row, in base 2. t_ij is the raw score q'.k', c'_i
// the scale times log2(e):
//   exponent_ij = c'_i (t_ij - a_i), sum_i = sum_j 2^exponent_ij, L_i = log2 sum_i,
//   p_ij = 2^(exponent_ij - L_i),    lse_i = (c'_i a_i + L_i) ln 2.
// a_i, the largest t_ij, is subtracted before anything is rounded at the size of the scores, so
// that sums and ratios of p are exact however large these are. lse_i is rounded at that size: it is
// a result for the caller, and no pass computes with it.
#pragma once

#include "cuda/attention/shared/scalar.h"

namespace drope::cuda {

// c' (t - a) - offset. Never above -offset where a is the largest t.
__device__ __forceinline__ float exponent(float t, float a, float scale_log2, float offset = 0.0f) {
  return fmaf(t - a, scale_log2, -offset);
}

// What the keys seen so far, or those of one part, leave of a row.
struct RowState {
  float row_max;  // a; anything finite where the row has seen no key
  float row_sum;  // of 2^exponent, 1 for the largest t alone; 0 where the row has seen no key

  __device__ __forceinline__ bool is_empty() const { return row_sum == 0.0f; }
  // L; inf in a row that sees no key, so that p is 0.
  __device__ __forceinline__ float log2_sum() const {
    return is_empty() ? infinity() : __log2f(row_sum);
  }
  // Finite wherever the scaled scores are: c' a itself may not be.
  __device__ __forceinline__ float lse(float scale_log2) const {
    return is_empty() ? -infinity() : fmaf(scale_log2 * kLn2, row_max, log2_sum() * kLn2);
  }
};

}  // namespace drope::cuda
