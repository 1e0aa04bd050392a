// The way out of dq, dk and dv: float32 sums of some rows in shared memory become rows of a 16-bit
// tensor, un-rotated first where the call rotates, and rounded once.
#pragma once

#include <type_traits>

#include "cuda/attention/backward/backward_rows.h"
#include "cuda/attention/shared/rotary.h"
#include "cuda/attention/shared/work_tile.h"
#include "cuda/tile/float_tile.h"

namespace drope::cuda {

// R^T, at the positions of rows first_row and on.
struct Restore {
  Rotation rotation;
  Positions positions;
  int first_row;

  // One warp, one row.
  __device__ __forceinline__ void operator()(float* channels, int row) const {
    const float position = positions.at(first_row + row);
    for (int pair = tile::lane_index(); pair < rotation.num_pairs(); pair += 32) {
      rotate_pair(channels[rotation.first_channel(pair)], channels[rotation.second_channel(pair)],
                  rotation.angle(position, pair));
    }
    __syncwarp();
  }
};

struct RestoreNothing {
  __device__ __forceinline__ void operator()(float*, int) const {}
};

template <class Position>
__device__ __forceinline__ auto restore_queries(const AttentionParams& params, const Sequence& s,
                                                int64_t kv_head, int first_row) {
  if constexpr (std::is_same_v<Position, Rotary>) {
    return Restore{Rotation(params.rotary, kv_head, -1.0f), query_positions(params, s), first_row};
  } else {
    return RestoreNothing{};
  }
}

template <class Position>
__device__ __forceinline__ auto restore_keys(const AttentionParams& params, const Sequence& s,
                                             int64_t kv_head, int first_row) {
  if constexpr (std::is_same_v<Position, Rotary>) {
    return Restore{Rotation(params.rotary, kv_head, -1.0f), key_positions(params, s), first_row};
  } else {
    return RestoreNothing{};
  }
}

template <class T>
__device__ __forceinline__ uint4 round_channels(T, const float* x) {
  const float4 low = *reinterpret_cast<const float4*>(x);
  const float4 high = *reinterpret_cast<const float4*>(x + 4);
  return make_uint4(tile::pack(T{}, low.x, low.y), tile::pack(T{}, low.z, low.w),
                    tile::pack(T{}, high.x, high.y), tile::pack(T{}, high.z, high.w));
}

// All threads of the block; the tile was written before a barrier. A warp takes a row at a time.
template <int kNumThreads, class T, class Tile, class RestoreRow>
__device__ __forceinline__ void store_grad_rows(T, Tile& sums, const TargetRows& to, int num_rows,
                                                int64_t num_channels,
                                                const RestoreRow& restore_row) {
  for (int row = static_cast<int>(threadIdx.x) / 32; row < num_rows; row += kNumThreads / 32) {
    float* const channels = sums.row(row);
    restore_row(channels, row);
    const int channel = tile::lane_index() * tile::kChunkCols;
    if (channel < num_channels) {
      *reinterpret_cast<uint4*>(to.at(row) + channel) = round_channels(T{}, channels + channel);
    }
  }
}

// dscale_i = sum_j dS_ij (q'_i . k'_j) = q'_i . dq'_i / scale_i, where dq' is dq before the
// rotation is undone: rows of `sums`. q, terms and grad_scale: of the first of these queries.
template <int kNumThreads, class T, class Tile>
__device__ __forceinline__ void store_grad_scale(T, Tile& sums, const SourceRows& q,
                                                 const QueryTerms* terms, int num_rows,
                                                 int64_t head_dim, float* grad_scale) {
  const int channel = tile::lane_index() * tile::kChunkCols;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < num_rows; row += kNumThreads / 32) {
    const bool sees = terms[row].log2_sum != infinity();  // else q may be anything
    float sum = 0.0f;
    if (sees && channel < head_dim) {
      float x[tile::kChunkCols];
      tile::unpack_chunk(T{}, *reinterpret_cast<const uint4*>(q.at(row) + channel), x);
#pragma unroll
      for (int i = 0; i < tile::kChunkCols; ++i) {
        sum = fmaf(x[i], sums.row(row)[channel + i], sum);
      }
    }
    sum = tile::warp_sum(sum);
    if (tile::lane_index() == 0) {
      grad_scale[row] = sees ? sum * (kLog2E / terms[row].scale_log2) : 0.0f;
    }
    __syncwarp();  // this warp restores the row next
  }
}

// dq, and dscale where it is wanted, of a tile of queries: grad_factor times the sums.
template <int BLOCK_Q, int kNumThreads, class Position, class T, class Tile>
__device__ __forceinline__ void store_grad_q(T, Tile& sums, const AttentionBackwardParams& params,
                                             const BackwardWorkspace& workspace,
                                             const WorkTile& work) {
  const Sequence& s = work.sequence;
  if (params.grad_scale != nullptr) {
    SourceRows q = query_rows(params, s, work.head);
    q.data = q.at(work.first_row);
    const int64_t terms = first_padded_index<BLOCK_Q>(params, workspace, s, work.head);
    store_grad_scale<kNumThreads>(
        T{}, sums, q, workspace.terms + terms + work.first_row, work.num_rows, params.head_dim,
        params.grad_scale + first_query_index(params, s, work.head) + work.first_row);
  }
  const int64_t kv_head = work.head / (params.num_heads_q / params.num_heads_kv);
  store_grad_rows<kNumThreads>(T{}, sums, grad_q_rows(params, s, work.head, work.first_row),
                               work.num_rows, params.head_dim,
                               restore_queries<Position>(params, s, kv_head, work.first_row));
}

}  // namespace drope::cuda
