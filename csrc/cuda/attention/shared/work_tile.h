// What one block of a grid works on: BLOCK consecutive queries, or keys, of one head of one row of
// the batch or of one packed sequence. The order of the tiles is TileSchedule's (heuristics.h).
//
// In packed calls the device alone knows the lengths. A head then has ceil(rows / BLOCK) + num_seqs
// tiles, never fewer than it needs: they are handed to the sequences in order, and those left over
// are empty.
#pragma once

#include "cuda/attention/shared/sequence.h"
#include "cuda/heuristics.h"
#include "cuda/tile/warp_search.h"

namespace drope::cuda {

struct WorkTile {
  Sequence sequence;
  int head;       // of q in a tile of queries, of k and v in a tile of keys
  int first_row;  // within the sequence
  int num_rows;   // at most BLOCK; 0 when there is nothing to do
};

// ---- host: how many tiles, and in which order --------------------------------------------------

inline int64_t num_row_blocks(int64_t num_rows, int block, const int32_t* cu_seqlens,
                              int64_t num_seqs) {
  return ceil_div(num_rows, block) + (cu_seqlens != nullptr ? num_seqs : 0);
}

// The heads that share keys stand together, so that these are read from L2.
template <int BLOCK>
TileSchedule query_tiles(const AttentionParams& p, int64_t l2_bytes) {
  const int64_t kv_bytes_per_head = p.seqlen_kv * (p.head_dim + p.head_dim_v) * 2;
  return tile_schedule(num_row_blocks(p.seqlen_q, BLOCK, p.cu_seqlens_q, p.num_seqs), p.num_heads_q,
                       p.num_heads_kv, p.batch, kv_bytes_per_head, l2_bytes);
}

// Backward, the queries of a kv head's whole group are read once for each tile of its keys.
template <int BLOCK>
TileSchedule key_tiles(const AttentionParams& p, int64_t l2_bytes) {
  const int64_t group = p.num_heads_kv > 0 ? p.num_heads_q / p.num_heads_kv : 0;
  const int64_t row_bytes = (p.head_dim + p.head_dim_v) * 2 + p.head_dim * 4;  // q, dO, sums of dq
  const int64_t q_bytes_per_head = group * p.seqlen_q * row_bytes;
  return tile_schedule(num_row_blocks(p.seqlen_kv, BLOCK, p.cu_seqlens_k, p.num_seqs),
                       p.num_heads_kv, p.num_heads_kv, p.batch, q_bytes_per_head, l2_bytes);
}

// ---- device: tile `index` of the schedule; whole warps call ------------------------------------

struct PackedBlock {
  int sequence;  // -1: past the last
  int block;     // of its rows
};

// Block `index` of packed rows, counted through the sequences.
template <int BLOCK>
__device__ __forceinline__ PackedBlock find_packed_block(const int32_t* cu_seqlens, int num_seqs,
                                                         int64_t num_rows, int index) {
  int num_before = 0;  // blocks of the sequences before `first`
  for (int first = 0; first < num_seqs; first += tile::kWarpSize) {
    const int sequence = first + tile::lane_index();
    int num_blocks = 0;
    if (sequence < num_seqs) {
      num_blocks = (packed_rows(cu_seqlens, sequence, num_rows).size() + BLOCK - 1) / BLOCK;
    }
    const int end = num_before + tile::inclusive_sum(num_blocks);
    const int lane = tile::first_lane(index < end);
    if (lane < tile::kWarpSize)
      return {first + lane, index - tile::from_lane(end - num_blocks, lane)};
    num_before = tile::from_lane(end, tile::kWarpSize - 1);
  }
  return {-1, 0};
}

// Where a tile is: which block of rows of which head.
struct TilePlace {
  int sequence;  // or row of the batch; -1: past the last
  int head, block;
};

// The last queries of a sequence, which see most keys when causal, come first.
template <int BLOCK>
__device__ __forceinline__ TilePlace query_place(const AttentionParams& params,
                                                 const TileSchedule& schedule, int64_t index) {
  const TileSchedule::Tile t = schedule.tile(index);
  if (params.cu_seqlens_q == nullptr) return {t.batch, t.head, t.q_block};
  const PackedBlock at = find_packed_block<BLOCK>(
      params.cu_seqlens_q, static_cast<int>(params.num_seqs), params.seqlen_q, t.q_block);
  return {at.sequence, t.head, at.block};
}

template <int BLOCK>
__device__ __forceinline__ WorkTile query_tile(const AttentionParams& params,
                                               const TilePlace& place) {
  WorkTile work{sequence_of(params, place.sequence), place.head, place.block * BLOCK, 0};
  work.num_rows = min(BLOCK, work.sequence.seqlen_q - work.first_row);
  return work;
}

template <int BLOCK>
__device__ __forceinline__ WorkTile query_tile(const AttentionParams& params,
                                               const TileSchedule& schedule, int64_t index) {
  const TilePlace place = query_place<BLOCK>(params, schedule, index);
  if (place.sequence < 0) return {};
  return query_tile<BLOCK>(params, place);
}

// The first keys of a sequence, which most queries see when causal, come first.
template <int BLOCK>
__device__ __forceinline__ WorkTile key_tile(const AttentionParams& params,
                                             const TileSchedule& schedule, int64_t index) {
  const TileSchedule::Tile t = schedule.tile(index);
  const int block = schedule.num_q_blocks - 1 - t.q_block;
  PackedBlock at{t.batch, block};
  if (params.cu_seqlens_k != nullptr) {
    at = find_packed_block<BLOCK>(params.cu_seqlens_k, static_cast<int>(params.num_seqs),
                                  params.seqlen_kv, block);
    if (at.sequence < 0) return {};
  }
  WorkTile work{sequence_of(params, at.sequence), t.head, at.block * BLOCK, 0};
  work.num_rows = min(BLOCK, work.sequence.seqlen_kv - work.first_row);
  return work;
}

}  // namespace drope::cuda
