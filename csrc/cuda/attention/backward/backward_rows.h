// What the backward kernels have in common: where rows of the gradients and of the workspace lie.
#pragma once

#include "cuda/attention/shared/block_range.h"
#include "cuda/attention/shared/head_rows.h"
#include "cuda/tile/copy_rows.h"
#include "cuda/workspace.h"

namespace drope::cuda {

__device__ __forceinline__ SourceRows out_rows(const AttentionBackwardParams& p, const Sequence& s,
                                               int head) {
  return {static_cast<const uint16_t*>(p.out) + s.batch * p.stride_out_batch +
              head * p.stride_out_head + s.first_q * p.stride_out_row,
          p.stride_out_row};
}

__device__ __forceinline__ SourceRows grad_out_rows(const AttentionBackwardParams& p,
                                                    const Sequence& s, int head) {
  return {static_cast<const uint16_t*>(p.grad_out) + s.batch * p.stride_grad_out_batch +
              head * p.stride_grad_out_head + s.first_q * p.stride_grad_out_row,
          p.stride_grad_out_row};
}

// row: of the sequence.
__device__ __forceinline__ TargetRows grad_q_rows(const AttentionBackwardParams& p,
                                                  const Sequence& s, int head, int row) {
  return {static_cast<uint16_t*>(p.grad_q) + s.batch * p.stride_grad_q_batch +
              head * p.stride_grad_q_head + (s.first_q + row) * p.stride_grad_q_row,
          p.stride_grad_q_row};
}

__device__ __forceinline__ TargetRows grad_k_rows(const AttentionBackwardParams& p,
                                                  const Sequence& s, int kv_head, int row) {
  return {static_cast<uint16_t*>(p.grad_k) + s.batch * p.stride_grad_k_batch +
              kv_head * p.stride_grad_k_head + (s.first_k + row) * p.stride_grad_k_row,
          p.stride_grad_k_row};
}

__device__ __forceinline__ TargetRows grad_v_rows(const AttentionBackwardParams& p,
                                                  const Sequence& s, int kv_head, int row) {
  return {static_cast<uint16_t*>(p.grad_v) + s.batch * p.stride_grad_v_batch +
              kv_head * p.stride_grad_v_head + (s.first_k + row) * p.stride_grad_v_row,
          p.stride_grad_v_row};
}

// Starts the copy of rows first, first + 1, ... of a head into a tile; those outside of `valid`,
// not empty, may be anything, NaN too, and become zeros.
template <int kNumThreads, class Tile>
__device__ __forceinline__ void copy_valid_rows(Tile& to, const SourceRows& from, int first,
                                                const RowRange& valid, int64_t num_channels) {
  tile::copy_rows_async<kNumThreads>(
      to,
      [&](int row) {
        const int inside = min(max(first + row, valid.begin), valid.end - 1);
        return tile::SourceRow{from.at(inside), first + row == inside};
      },
      static_cast<int>(num_channels));
}

// Index of query 0 of the sequence in arrays of num_q_blocks * BLOCK_Q rows a head. In packed calls
// sequence n has the blocks from first_q / BLOCK_Q + n on: the rounding costs each at most one.
template <int BLOCK_Q>
__device__ __forceinline__ int64_t first_padded_index(const AttentionBackwardParams& p,
                                                      const BackwardWorkspace& workspace,
                                                      const Sequence& s, int head) {
  const int64_t num_before = s.index - s.batch;  // sequences of a packed call, else 0
  const int64_t block =
      (s.batch * p.num_heads_q + head) * workspace.num_q_blocks + s.first_q / BLOCK_Q + num_before;
  return block * BLOCK_Q;
}

// dq and dk are sums of ratio dS, times this.
__device__ __forceinline__ float grad_factor(const AttentionParams& p) {
  return rsqrtf(static_cast<float>(p.head_dim));
}

}  // namespace drope::cuda
