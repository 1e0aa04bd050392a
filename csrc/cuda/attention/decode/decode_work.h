// What one block of a decode call works on: BLOCK_M rows of one kv head, and one part of their
// keys.
#pragma once

#include "cuda/attention/decode/decode_append.h"
#include "cuda/attention/decode/group_rows.h"
#include "cuda/attention/decode/kv_cache.h"
#include "cuda/attention/shared/block_range.h"
#include "cuda/attention/shared/sequence.h"

namespace drope::cuda {

// What one block of the grid works on.
struct DecodeWork {
  GroupRows rows;
  int kv_head, split;
  WarpOf warp;  // this one among the warps of the (batch row, kv head)
};

template <class Config>
__device__ __forceinline__ DecodeWork decode_work(const AttentionDecodeParams& params) {
  const unsigned num_splits = static_cast<unsigned>(params.num_splits);
  const unsigned num_heads = static_cast<unsigned>(params.num_heads_kv);
  const int group = static_cast<int>(params.num_heads_q) / static_cast<int>(num_heads);
  const int all_rows = group * static_cast<int>(params.seqlen_q);
  const unsigned num_blocks = max(1u, (all_rows + Config::BLOCK_M - 1u) / Config::BLOCK_M);
  const unsigned split = blockIdx.x % num_splits, tile = blockIdx.x / num_splits;
  const unsigned block = tile % num_blocks, head = tile / num_blocks % num_heads;

  DecodeWork work;
  work.kv_head = static_cast<int>(head);
  work.split = static_cast<int>(split);
  work.rows.batch = tile / num_blocks / num_heads;
  work.rows.group = group;
  work.rows.first_head = work.kv_head * group;
  work.rows.first_row = static_cast<int>(block) * Config::BLOCK_M;
  work.rows.num_rows = min(Config::BLOCK_M, all_rows - work.rows.first_row);
  const int warp = static_cast<int>(threadIdx.x) / tile::kWarpSize;
  work.warp = {static_cast<int>(block * num_splits + split) * Config::kNumWarps + warp,
               static_cast<int>(num_blocks * num_splits) * Config::kNumWarps};
  return work;
}

// The batch row after the append, with its queries at its end.
__device__ __forceinline__ Sequence decode_sequence(const KvCache& cache) {
  const AttentionDecodeParams& params = cache.params;
  Sequence s{
      cache.batch, 0, 0, static_cast<int>(params.seqlen_q), static_cast<int>(params.seqlen_kv),
      0,           0, 0};
  s.q_start = cache.num_keys - params.seqlen_q;
  const int32_t* const kv_start = params.mask.kv_start;
  if (kv_start != nullptr) s.kv_begin = clamp_to_int(kv_start[s.batch], 0, params.seqlen_kv);
  s.kv_end = static_cast<int>(cache.num_keys);
  return s;
}

// Part `split` of the blocks; the first parts are one block longer where they do not divide.
__device__ __forceinline__ BlockRange part_of(BlockRange blocks, int split, int num_splits) {
  const int num_blocks = blocks.end - blocks.begin;
  const int size = num_blocks / num_splits, longer = num_blocks % num_splits;
  blocks.begin += split * size + min(split, longer);
  blocks.end = blocks.begin + size + (split < longer ? 1 : 0);
  return blocks;
}

}  // namespace drope::cuda
