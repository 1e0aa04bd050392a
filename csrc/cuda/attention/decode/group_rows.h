// The rows of a decode tile: the (query, q head of the group) pairs of one kv head, the heads of a
// query side by side, so that all of them read the keys once.
#pragma once

#include <cstdint>

#include "cuda/attention/shared/head_rows.h"
#include "cuda/attention/shared/sequence.h"

namespace drope::cuda {

struct GroupRows {
  int64_t batch;
  int first_head, group;    // q heads first_head .. first_head + group - 1
  int first_row, num_rows;  // of the tile, among all group * seqlen_q; num_rows <= BLOCK_M

  // Row `row` of the tile.
  __device__ __forceinline__ int query(int row) const { return (first_row + row) / group; }
  __device__ __forceinline__ int head(int row) const {
    return first_head + (first_row + row) % group;
  }
  __device__ __forceinline__ int first_query() const { return query(0); }
  __device__ __forceinline__ int num_queries() const {
    return query(num_rows - 1) - first_query() + 1;
  }

  __device__ __forceinline__ const uint16_t* q(const AttentionDecodeParams& p, int row) const {
    return static_cast<const uint16_t*>(p.q) + batch * p.stride_q_batch +
           head(row) * p.stride_q_head + query(row) * p.stride_q_row;
  }
  __device__ __forceinline__ uint16_t* out(const AttentionDecodeParams& p, int row) const {
    return static_cast<uint16_t*>(p.out) + batch * p.stride_out_batch +
           head(row) * p.stride_out_head + query(row) * p.stride_out_row;
  }
  // Index in a contiguous (batch, num_heads_q, seqlen_q) tensor.
  __device__ __forceinline__ int64_t index(const AttentionDecodeParams& p, int row) const {
    return (batch * p.num_heads_q + head(row)) * p.seqlen_q + query(row);
  }
};

// Positions of the rows, for rotate_rows.
struct GroupPositions {
  const GroupRows& rows;
  int64_t q_start;
  __device__ __forceinline__ float at(int row) const {
    return static_cast<float>(q_start + rows.query(row));
  }
};

}  // namespace drope::cuda
