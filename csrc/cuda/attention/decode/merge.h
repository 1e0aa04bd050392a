// Attention over disjoint sets of keys, joined: the mean of the parts' outs with the weights
// row_sum_n 2^(c' (a_n - a)), where a is the largest a_n (exponent.h). Parts that saw no key have a
// sum of 0 and may leave their out unwritten; a part that is NaN makes the whole NaN.
#pragma once

#include <cfloat>
#include <cstdint>

#include "attention_params.h"
#include "cuda/attention/shared/exponent.h"
#include "cuda/attention/shared/softmax.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/convert.h"

namespace drope::cuda {

// The weight of a part's out, which is normalised, where the whole row's maximum is row_max.
__device__ __forceinline__ float merge_weight(const RowState& part, float row_max,
                                              float scale_log2) {
  return part.row_sum * ptx::ex2_approx_ftz(exponent(part.row_max, row_max, scale_log2));
}

// The state of the whole row; state_of(n) is that of part n.
template <class StateOf>
__device__ __forceinline__ RowState merged_state(int num_parts, const StateOf& state_of,
                                                 float scale_log2) {
  RowState whole{-FLT_MAX, 0.0f};
  for (int n = 0; n < num_parts; ++n) whole.row_max = fmaxf(whole.row_max, state_of(n).row_max);
  for (int n = 0; n < num_parts; ++n) {
    whole.row_sum += merge_weight(state_of(n), whole.row_max, scale_log2);
  }
  return whole;
}

// Small blocks, so that the few rows of one token reach several SMs.
inline constexpr int kMergeThreads = 32;
// Parts that a thread asks for at once: one after the other, each would take the latency of L2.
inline constexpr int kPartsAtOnce = 4;

// A thread merges eight channels of one row over the splits.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_splits_kernel(const __grid_constant__ AttentionDecodeParams params) {
  const int num_splits = static_cast<int>(params.num_splits);
  const int64_t num_rows = params.batch * params.num_heads_q * params.seqlen_q;
  const int num_chunks = static_cast<int>(params.head_dim_v / 8);
  const int64_t item = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  const int64_t row = item / num_chunks;
  const int chunk = static_cast<int>(item % num_chunks);
  if (row >= num_rows) return;

  const int64_t query = row % params.seqlen_q, head_row = row / params.seqlen_q;
  const int64_t head = head_row % params.num_heads_q, batch = head_row / params.num_heads_q;
  const float scale_log2 = logit_scale(params, batch, head, query) * kLog2E;
  const float* const part_max = params.partial_state + row;
  const float* const part_sum = part_max + num_splits * num_rows;
  const float* const part_out = params.partial_out + row * params.head_dim_v + 8 * chunk;
  const auto state_of = [&](int n) {
    return RowState{part_max[n * num_rows], part_sum[n * num_rows]};
  };
  const RowState whole = merged_state(num_splits, state_of, scale_log2);
  const float inverse = whole.is_empty() ? 0.0f : 1.0f / whole.row_sum;
  float acc_o[8] = {};
  for (int first = 0; first < num_splits; first += kPartsAtOnce) {
    float weight[kPartsAtOnce];
    float4 low[kPartsAtOnce] = {}, high[kPartsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const int n = min(first + i, num_splits - 1);
      weight[i] = merge_weight(state_of(n), whole.row_max, scale_log2) * inverse;
      if (n != first + i) weight[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      if (weight[i] == 0.0f) continue;  // not written, perhaps
      const auto* const part =
          reinterpret_cast<const float4*>(part_out + (first + i) * num_rows * params.head_dim_v);
      low[i] = part[0];
      high[i] = part[1];
    }
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const float x[8] = {low[i].x,  low[i].y,  low[i].z,  low[i].w,
                          high[i].x, high[i].y, high[i].z, high[i].w};
#pragma unroll
      for (int c = 0; c < 8; ++c) acc_o[c] = fmaf(weight[i], x[c], acc_o[c]);
    }
  }

  auto* const out = static_cast<uint16_t*>(params.out) + batch * params.stride_out_batch +
                    head * params.stride_out_head + query * params.stride_out_row;
  *reinterpret_cast<uint4*>(out + 8 * chunk) = tile::pack_chunk(T{}, acc_o);
  if (chunk == 0) params.lse[row] = whole.lse(scale_log2);
}

}  // namespace drope::cuda
