// Where the rows of one head of one sequence lie in the tensors of a call.
#pragma once

#include <cstdint>

#include "cuda/attention/shared/sequence.h"
#include "cuda/tile/copy_rows.h"

namespace drope::cuda {

// Rows of 16-bit channels; row 0 is the sequence's first.
template <class Element>
struct HeadRows {
  Element* data;
  int64_t stride_row;
  __device__ __forceinline__ Element* at(int row) const { return data + row * stride_row; }
  // Rows [begin, end) as copies of whole tiles read them.
  __device__ __forceinline__ tile::RowWindow window(int begin, int end) const {
    return {data, stride_row, begin, end};
  }
};

using SourceRows = HeadRows<const uint16_t>;
using TargetRows = HeadRows<uint16_t>;

__device__ __forceinline__ SourceRows query_rows(const AttentionParams& p, const Sequence& s,
                                                 int head) {
  return {static_cast<const uint16_t*>(p.q) + s.batch * p.stride_q_batch + head * p.stride_q_head +
              s.first_q * p.stride_q_row,
          p.stride_q_row};
}

__device__ __forceinline__ SourceRows key_rows(const AttentionParams& p, const Sequence& s,
                                               int kv_head) {
  return {static_cast<const uint16_t*>(p.k) + s.batch * p.stride_k_batch +
              kv_head * p.stride_k_head + s.first_k * p.stride_k_row,
          p.stride_k_row};
}

__device__ __forceinline__ SourceRows value_rows(const AttentionParams& p, const Sequence& s,
                                                 int kv_head) {
  return {static_cast<const uint16_t*>(p.v) + s.batch * p.stride_v_batch +
              kv_head * p.stride_v_head + s.first_k * p.stride_v_row,
          p.stride_v_row};
}

__device__ __forceinline__ TargetRows out_rows(const AttentionForwardParams& p, const Sequence& s,
                                               int head) {
  return {static_cast<uint16_t*>(p.out) + s.batch * p.stride_out_batch + head * p.stride_out_head +
              s.first_q * p.stride_out_row,
          p.stride_out_row};
}

// Index of query 0 in a contiguous (batch, num_heads_q, seqlen_q) tensor, and of key 0 in a
// (batch, num_heads_kv, seqlen_kv) one.
__device__ __forceinline__ int64_t first_query_index(const AttentionParams& p, const Sequence& s,
                                                     int head) {
  return (s.batch * p.num_heads_q + head) * p.seqlen_q + s.first_q;
}

__device__ __forceinline__ int64_t first_key_index(const AttentionParams& p, const Sequence& s,
                                                   int kv_head) {
  return (s.batch * p.num_heads_kv + kv_head) * p.seqlen_kv + s.first_k;
}

}  // namespace drope::cuda
