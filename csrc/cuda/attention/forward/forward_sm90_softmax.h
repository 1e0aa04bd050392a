// The softmax of the sm_90a forward kernel. Its instructions stand beside the products, and a
// subtraction for every score would be a seventh of them. So where c' a is moderate in all rows of
// a warp, exponents are fma(c', t, -round(c' a)), one instruction instead of two. What the rounding
// lost, at most 2^-4, multiplies acc_o and row_sum of a row alike, and is taken out of row_sum in
// the end: the state that the row leaves is that of exponent.h.
#pragma once

#include "cuda/attention/shared/softmax.h"
#include "cuda/tile/warp_search.h"

namespace drope::cuda {

struct ForwardSm90Softmax : Softmax {
  // |c' a| up to which exponents are one instruction.
  static constexpr float kModerate = 0x1p20f;

  // acc_o and row_sum of a row whose maximum is `largest` carry 2^(this): c' a - round(c' a). From
  // twice kModerate on it is 0: a maximum that grows from there to below kModerate leaves nothing
  // of what came before.
  __device__ __forceinline__ float carried(int h, float largest) const {
    const float base = __fmul_rn(scale_log2[h], largest);
    return fabsf(base) < 2 * kModerate ? fmaf(scale_log2[h], largest, -base) : 0.0f;
  }

  // As Softmax::update.
  template <int kSize>
  __device__ __forceinline__ void update(float (&acc_s)[kSize],
                                         float (&row_scale)[tile::kRowsPerThread]) {
    float new_max[tile::kRowsPerThread];
    bool is_moderate = true;
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      new_max[h] = max_with(acc_s, h);
      is_moderate = is_moderate && fabsf(scale_log2[h] * new_max[h]) <= kModerate;
    }
    float base[tile::kRowsPerThread];    // exponents are c' acc_s - base
    float change[tile::kRowsPerThread];  // log2 of row_scale
    if (tile::all_lanes(is_moderate)) {
#pragma unroll
      for (int h = 0; h < tile::kRowsPerThread; ++h) {
        base[h] = __fmul_rn(scale_log2[h], new_max[h]);
        change[h] = __fmul_rn(scale_log2[h], row_max[h]) - base[h];
      }
    } else {
      subtract_max(acc_s, new_max, base, change);
    }
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      row_max[h] = new_max[h];
      row_scale[h] = ptx::ex2_approx_ftz(change[h]);
      row_sum[h] *= row_scale[h];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int h = i / 2 % 2;
      acc_s[i] = ptx::ex2_approx_ftz(exponent(acc_s[i], 0.0f, scale_log2[h], base[h]));
      row_sum[h] += acc_s[i];
    }
  }

  // For large c' a, and for rows that have seen no key: the difference first, then its product.
  template <int kSize>
  __device__ __forceinline__ void subtract_max(float (&acc_s)[kSize],
                                               const float (&new_max)[tile::kRowsPerThread],
                                               float (&base)[tile::kRowsPerThread],
                                               float (&change)[tile::kRowsPerThread]) const {
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      base[h] = -carried(h, new_max[h]);
      change[h] = exponent(row_max[h], new_max[h], scale_log2[h], base[h] + carried(h, row_max[h]));
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) acc_s[i] -= new_max[i / 2 % 2];
  }

  // As Softmax::finish.
  __device__ __forceinline__ RowState finish(int h, float& inverse) const {
    RowState row = Softmax::finish(h, inverse);
    row.row_sum *= ptx::ex2_approx_ftz(-carried(h, row_max[h]));
    return row;
  }
};

}  // namespace drope::cuda
