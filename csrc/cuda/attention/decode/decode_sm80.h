// Decoding on sm_80: append new keys, attend to a cache, in params.num_splits parts
// (FlashAttention-2, arXiv 2307.08691, algorithm 1, in each warp). A block owns BLOCK_M rows of one
// kv head and one part of their keys. Each of its warps passes over keys of its own with a ring and
// a running softmax of its own, and in the end the warps' results are merged as those of the parts
// are.
#pragma once

#include <type_traits>

#include "cuda/attention/decode/decode_results.h"
#include "cuda/attention/decode/decode_sm80_config.h"
#include "cuda/attention/decode/decode_work.h"
#include "cuda/attention/shared/mask.h"
#include "cuda/attention/shared/rotary.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/tile/copy_rows.h"
#include "cuda/tile/warp_mma.h"
#include "cuda/tile/warp_search.h"

namespace drope::cuda {

// Starts the copies of the tile's queries.
template <class Config>
__device__ __forceinline__ void copy_queries_async(typename Config::Smem& smem,
                                                   const AttentionDecodeParams& params,
                                                   const GroupRows& rows) {
  using Tile = decltype(smem.q);
  for (int piece = static_cast<int>(threadIdx.x); piece < Tile::kRows * Tile::kNumChunks;
       piece += Config::kNumThreads) {
    const int row = piece / Tile::kNumChunks, chunk = piece % Tile::kNumChunks;
    const int inside = min(row, rows.num_rows - 1);
    tile::copy_chunk_async(smem.q, row, chunk, {rows.q(params, inside), row == inside},
                           static_cast<int>(params.head_dim));
  }
}

// Starts the copies of a warp's keys and values; lane r holds the place of row r, and works out
// where that is for all lanes.
template <class Stage>
__device__ __forceinline__ void copy_keys_async(Stage& stage, const KvCache& cache,
                                                KeyPlace place) {
  using Tile = decltype(stage.k);
  constexpr int kPiecesPerLane = Tile::kRows * Tile::kNumChunks / tile::kWarpSize;
  const int head_dim = static_cast<int>(cache.params.head_dim);
  const int head_dim_v = static_cast<int>(cache.params.head_dim_v);
  const unsigned rows_there = tile::lanes_where(cache.is_there(place));
  const uint16_t* const k_row = cache.key_row(place);
  const uint16_t* const v_row = cache.value_row(place);
#pragma unroll
  for (int i = 0; i < kPiecesPerLane; ++i) {
    const int piece = tile::lane_index() + i * tile::kWarpSize;
    const int row = piece / Tile::kNumChunks, chunk = piece % Tile::kNumChunks;
    const bool is_there = (rows_there >> row & 1) != 0;
    tile::copy_chunk_async(stage.k, row, chunk, {tile::from_lane(k_row, row), is_there}, head_dim);
    tile::copy_chunk_async(stage.v, row, chunk, {tile::from_lane(v_row, row), is_there},
                           head_dim_v);
  }
}

// The keys that each row of a warp's tile sees; rows beyond the last one see none.
template <int kM16>
struct SeenKeys {
  KeyRange of[kM16][tile::kRowsPerThread];

  __device__ __forceinline__ SeenKeys(const Visibility& visible, const GroupRows& rows) {
#pragma unroll
    for (int m = 0; m < kM16; ++m) {
#pragma unroll
      for (int h = 0; h < tile::kRowsPerThread; ++h) {
        const int row = 16 * m + tile::accumulator_row(h);
        of[m][h] = row < rows.num_rows ? visible.keys_of(rows.query(row)) : KeyRange{0, 0};
      }
    }
  }

  // Queries that see a lost key, first_key + (a bit of `lost`), have no result: NaN stays in a sum.
  __device__ __forceinline__ void poison(Softmax (&softmax)[kM16], unsigned lost,
                                         int first_key) const {
    for (; lost != 0; lost &= lost - 1) {
      const int key = first_key + __ffs(static_cast<int>(lost)) - 1;
#pragma unroll
      for (int m = 0; m < kM16; ++m) {
#pragma unroll
        for (int h = 0; h < tile::kRowsPerThread; ++h) {
          const bool is_seen = of[m][h].begin <= key && key < of[m][h].end;
          if (is_seen) softmax[m].row_sum[h] = not_a_number();
        }
      }
    }
  }
};

template <class Config, class T, class Position>
__global__ void __launch_bounds__(Config::kNumThreads, Config::kBlocksPerSm)
    decode_sm80_kernel(const __grid_constant__ AttentionDecodeParams params) {
  constexpr int HEAD_DIM = Config::HEAD_DIM, BLOCK_KV = Config::BLOCK_KV;
  constexpr int kM16 = Config::kM16, kStages = Config::kStages, kKeys = Config::kKeysPerWarp;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::Smem*>(smem_bytes);
  const int thread = static_cast<int>(threadIdx.x), lane = tile::lane_index(), warp = thread / 32;

  const DecodeWork work = decode_work<Config>(params);
  const GroupRows& rows = work.rows;
  const KvCache cache(params, rows.batch, work.kv_head);
  if (!cache.fits()) {
    store_everywhere<Config>(T{}, params, work, not_a_number());
    return;
  }
  const Sequence s = decode_sequence(cache);
  const Visibility visible(params.mask, s);
  const int first_query = rows.first_query(), num_queries = rows.num_queries();
  const KeyRange keys = visible.keys_of_rows(first_query, num_queries);
  const BlockRange kv_blocks = part_of(visible.kv_blocks<BLOCK_KV>(first_query, num_queries),
                                       work.split, static_cast<int>(params.num_splits));
  if (kv_blocks.empty() || rows.num_rows == 0) {
    append(T{}, Position{}, cache, work.warp);
    store_everywhere<Config>(T{}, params, work, 0.0f);
    return;
  }

  // Keys of this warp. Those that no query of the tile sees may hold anything, NaN too: they are
  // zeros to the tile.
  auto& ring = smem.ring[warp];
  const auto first_key = [&](int kv_block) { return kv_block * BLOCK_KV + warp * kKeys; };
  const auto place_in = [&](int kv_block) {
    const int key = first_key(kv_block) + lane % kKeys;
    const bool wanted = kv_block < kv_blocks.end && keys.begin <= key && key < keys.end;
    return wanted ? cache.place_of(key) : KeyPlace{0, KeyPlace::kNone};
  };
  const SeenKeys<kM16> seen(visible, rows);
  Softmax softmax[kM16];
#pragma unroll
  for (int m = 0; m < kM16; ++m) softmax[m].reset();
  int next_block = kv_blocks.begin;
  KeyPlace next_place = place_in(next_block);  // read one block ahead of the copies it is for
  const auto copy_next = [&] {
    if (next_block < kv_blocks.end) {
      copy_keys_async(ring[(next_block - kv_blocks.begin) % kStages], cache, next_place);
      const bool is_lost = lane < kKeys && cache.is_lost(next_place);
      seen.poison(softmax, tile::lanes_where(is_lost), first_key(next_block));
      next_place = place_in(++next_block);
    }
    ptx::cp_async_commit_group();  // also when empty: the waits count groups
  };

  copy_queries_async<Config>(smem, params, rows);
  ptx::cp_async_commit_group();
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) copy_next();
  append(T{}, Position{}, cache, work.warp);  // while the copies are under way
#pragma unroll
  for (int m = 0; m < kM16; ++m) {
#pragma unroll
    for (int h = 0; h < tile::kRowsPerThread; ++h) {
      const int row = min(16 * m + tile::accumulator_row(h), rows.num_rows - 1);
      softmax[m].scale_log2[h] = query_scale(params, s, rows.head(row), rows.query(row)) * kLog2E;
    }
  }
  ptx::cp_async_wait_group<kStages - 1>();
  __syncthreads();  // q is there
  if constexpr (std::is_same_v<Position, Rotary>) {
    rotate_rows<Config::kNumThreads>(T{}, smem.q, Rotation(params.rotary, work.kv_head, 1.0f),
                                     GroupPositions{rows, s.q_start}, 0, rows.num_rows, thread);
    __syncthreads();
  }

  float acc_o[kM16][HEAD_DIM / 2] = {};
  for (int kv_block = kv_blocks.begin; kv_block < kv_blocks.end; ++kv_block) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncwarp();  // every lane's copies have landed, and all have left the stage filled next
    copy_next();
    auto& stage = ring[(kv_block - kv_blocks.begin) % kStages];
    if constexpr (std::is_same_v<Position, Rotary>) {
      // In a rotated cache only the new keys are as they came.
      const int64_t first_new = cache.num_cached - first_key(kv_block);
      const int begin = params.rotated_cache ? clamp_to_int(first_new, 0, kKeys) : 0;
      rotate_rows<32>(T{}, stage.k, Rotation(params.rotary, work.kv_head, 1.0f),
                      Positions{nullptr, first_key(kv_block)}, 0, kKeys, lane, begin);
      __syncwarp();
    }

    float acc_s[kM16][kKeys / 2] = {};
    tile::multiply_a_bt<HEAD_DIM / 16>(T{}, acc_s, smem.q, 0, stage.k, 0);
#pragma unroll
    for (int m = 0; m < kM16; ++m) {
      if (kv_blocks.needs_mask(kv_block)) {
        mask_scores(acc_s[m], seen.of[m], first_key(kv_block));
      }
      float row_scale[tile::kRowsPerThread];
      softmax[m].update(acc_s[m], row_scale);
      scale_rows(acc_o[m], row_scale);
    }
    tile::multiply_p_b(T{}, acc_o, acc_s, stage.v);
  }

  __syncthreads();  // all warps have left the ring
#pragma unroll
  for (int m = 0; m < kM16; ++m) leave_part<Config>(smem.parts, warp, m, acc_o[m], softmax[m]);
  __syncthreads();
  store_merged<Config>(T{}, params, work, smem.parts);
}

}  // namespace drope::cuda
