// Attention over disjoint sets of keys, joined: lse = log sum_n exp(lse_n) and out = sum_n
// exp(lse_n - lse) out_n, as drope_kernels/merge.py. Parts that saw no key have lse -inf and may
// leave their out unwritten; a part that is NaN makes the whole NaN.
#pragma once

#include <cstdint>

#include "attention_params.h"
#include "cuda/attention/shared/scalar.h"
#include "cuda/ptx/math.h"
#include "cuda/tile/convert.h"

namespace drope::cuda {

// lse_of(n) is the lse of part n.
template <class LseOf>
__device__ __forceinline__ float merged_lse(int num_parts, const LseOf& lse_of) {
  float row_max = -infinity();
  for (int n = 0; n < num_parts; ++n) row_max = fmaxf(row_max, lse_of(n));
  const float shift = row_max == -infinity() ? 0.0f : row_max;
  float row_sum = 0.0f;
  for (int n = 0; n < num_parts; ++n) {
    row_sum += ptx::ex2_approx_ftz((lse_of(n) - shift) * kLog2E);
  }
  return row_sum == 0.0f ? -infinity() : shift + __log2f(row_sum) * kLn2;
}

__device__ __forceinline__ float merge_weight(float lse_part, float lse) {
  return lse_part == -infinity() ? 0.0f : ptx::ex2_approx_ftz((lse_part - lse) * kLog2E);
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

  const float* const part_lse = params.partial_lse + row;
  const float* const part_out = params.partial_out + row * params.head_dim_v + 8 * chunk;
  const float lse = merged_lse(num_splits, [&](int n) { return part_lse[n * num_rows]; });
  float acc_o[8] = {};
  for (int first = 0; first < num_splits; first += kPartsAtOnce) {
    float weight[kPartsAtOnce];
    float4 low[kPartsAtOnce] = {}, high[kPartsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const int n = min(first + i, num_splits - 1);
      weight[i] = merge_weight(part_lse[n * num_rows], lse);
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

  const int64_t query = row % params.seqlen_q, head_row = row / params.seqlen_q;
  const int64_t head = head_row % params.num_heads_q, batch = head_row / params.num_heads_q;
  auto* const out = static_cast<uint16_t*>(params.out) + batch * params.stride_out_batch +
                    head * params.stride_out_head + query * params.stride_out_row;
  *reinterpret_cast<uint4*>(out + 8 * chunk) = tile::pack_chunk(T{}, acc_o);
  if (chunk == 0) params.lse[row] = lse;
}

}  // namespace drope::cuda
