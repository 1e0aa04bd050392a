// Which instance of the sm_80 decode kernel a call launches, and the merge of its parts.
#pragma once

#include <climits>

#include "cuda/attention/decode/decode_sm80.h"
#include "cuda/attention/decode/merge.h"
#include "cuda/attention/shared/launch.h"
#include "cuda/attention/shared/launch_kernel.h"
#include "cuda/heuristics.h"
#include "cuda/ptx/element.h"

namespace drope::cuda {

// (query, q head) pairs of one kv head.
inline int64_t group_rows(const AttentionDecodeParams& params) {
  return params.num_heads_q / params.num_heads_kv * params.seqlen_q;
}

template <class Config, class T, class Position>
cudaError_t launch_decode_sm80(const AttentionDecodeParams& params, cudaStream_t stream) {
  const int64_t rows = group_rows(params);
  const int64_t row_blocks = rows > 0 ? ceil_div(rows, Config::BLOCK_M) : 1;  // 1 to append
  const int64_t num_blocks = params.batch * params.num_heads_kv * row_blocks * params.num_splits;
  if (num_blocks == 0) return cudaSuccess;
  if (num_blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel(decode_sm80_kernel<Config, T, Position>,
                       dim3(static_cast<unsigned>(num_blocks)), Config::kNumThreads,
                       sizeof(typename Config::Smem), stream, params);
}

template <class T>
cudaError_t launch_merge(const AttentionDecodeParams& params, cudaStream_t stream) {
  const int64_t num_chunks = params.head_dim_v / tile::kChunkCols;
  const int64_t num_items = params.batch * params.num_heads_q * params.seqlen_q * num_chunks;
  if (params.num_splits == 1 || num_items == 0) return cudaSuccess;
  const int64_t num_blocks = ceil_div(num_items, kMergeThreads);
  if (num_blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel(merge_splits_kernel<T>, dim3(static_cast<unsigned>(num_blocks)),
                       kMergeThreads, 0, stream, params);
}

template <class Config, class T>
cudaError_t launch_decode_sm80(const AttentionDecodeParams& params, cudaStream_t stream) {
  const cudaError_t status = params.rotary.rotary_dim > 0
                                 ? launch_decode_sm80<Config, T, Rotary>(params, stream)
                                 : launch_decode_sm80<Config, T, NoPosition>(params, stream);
  return status != cudaSuccess ? status : launch_merge<T>(params, stream);
}

template <class Config>
cudaError_t launch_decode_sm80(const AttentionDecodeParams& params, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16
             ? launch_decode_sm80<Config, ptx::BFloat16>(params, stream)
             : launch_decode_sm80<Config, ptx::Float16>(params, stream);
}

template <int HEAD_DIM>
cudaError_t launch_decode_sm80(const AttentionDecodeParams& params, cudaStream_t stream) {
  constexpr int kMostRows = decode_block(HEAD_DIM, INT_MAX).rows;
  using Small = DecodeSm80Config<HEAD_DIM, 16>;
  using Large = DecodeSm80Config<HEAD_DIM, kMostRows>;
  static_assert(decode_block(HEAD_DIM, 16).rows == 16, "the host counts the rows of a tile");
  static_assert(decode_block(HEAD_DIM, 16).keys == Small::BLOCK_KV);
  static_assert(decode_block(HEAD_DIM, 16).blocks_per_sm == Small::kBlocksPerSm);
  return decode_block(HEAD_DIM, group_rows(params)).rows == 16
             ? launch_decode_sm80<Small>(params, stream)
             : launch_decode_sm80<Large>(params, stream);
}

}  // namespace drope::cuda
