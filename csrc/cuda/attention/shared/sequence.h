// One row of the batch, or one sequence of a packed call: where its rows lie and what it may see.
// Values that the caller keeps on the device (cu_seqlens, q_start, kv_start, kv_end) are clamped to
// the tensors, so that no value of theirs can lead outside.
#pragma once

#include <cstdint>

#include "attention_params.h"

namespace drope::cuda {

// Beyond any index of a key and any window that matters; sums of three of them fit an int64.
inline constexpr int64_t kUnlimited = int64_t{1} << 40;

struct Sequence {
  int64_t batch;             // index of strides; 0 in packed calls
  int64_t first_q, first_k;  // its first rows; 0 unless packed
  int seqlen_q, seqlen_kv;
  int64_t q_start;       // key index of query 0
  int kv_begin, kv_end;  // valid keys
  int index = 0;         // of the batch row, or of the packed sequence
};

__device__ __forceinline__ int clamp_to_int(int64_t x, int64_t low, int64_t high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

__device__ __forceinline__ Sequence batch_row(const AttentionParams& params, int64_t batch) {
  const MaskParams& mask = params.mask;
  const int64_t seqlen_kv = params.seqlen_kv;
  Sequence s{batch, 0, 0, static_cast<int>(params.seqlen_q), static_cast<int>(seqlen_kv), 0, 0, 0};
  s.q_start = mask.q_start != nullptr ? mask.q_start[batch] : mask.q_offset;
  s.kv_begin = mask.kv_start != nullptr ? clamp_to_int(mask.kv_start[batch], 0, seqlen_kv) : 0;
  s.kv_end = mask.kv_end != nullptr ? clamp_to_int(mask.kv_end[batch], 0, seqlen_kv)
                                    : static_cast<int>(seqlen_kv);
  return s;
}

// Rows [begin, end) of sequence `index` in a packed tensor of num_rows rows.
struct RowRange {
  int begin, end;
  __device__ __forceinline__ int size() const { return end - begin; }
};

__device__ __forceinline__ RowRange packed_rows(const int32_t* cu_seqlens, int64_t index,
                                                int64_t num_rows) {
  const int begin = clamp_to_int(cu_seqlens[index], 0, num_rows);
  return {begin, clamp_to_int(cu_seqlens[index + 1], begin, num_rows)};
}

// Sequence `index` of a packed call.
__device__ __forceinline__ Sequence packed_sequence(const AttentionParams& params, int64_t index) {
  Sequence s{};
  const RowRange q = packed_rows(params.cu_seqlens_q, index, params.seqlen_q);
  const RowRange k = packed_rows(params.cu_seqlens_k, index, params.seqlen_kv);
  s.first_q = q.begin;
  s.first_k = k.begin;
  s.seqlen_q = q.size();
  s.seqlen_kv = s.kv_end = k.size();
  s.q_start = s.seqlen_kv - s.seqlen_q;
  return s;
}

// Row `index` of the batch, or sequence `index` of a packed call.
__device__ __forceinline__ Sequence sequence_of(const AttentionParams& params, int64_t index) {
  Sequence s =
      params.cu_seqlens_q != nullptr ? packed_sequence(params, index) : batch_row(params, index);
  s.index = static_cast<int>(index);
  return s;
}

}  // namespace drope::cuda
