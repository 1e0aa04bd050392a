// What a call of the attention kernels is made of: raw pointers, element strides, and shapes in
// the margin. Every tensor has unit stride in its last dimension. Strides count elements and may
// be 0 (expanded tensors).
#pragma once

#include <cstdint>

namespace drope {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// How queries and keys are rotated. Absent when rotary_dim is 0.
struct RotaryParams {
  int64_t rotary_dim = 0;    // leading channels that rotate, even, <= head_dim; 0: position-free
  bool interleaved = false;  // pairs (2i, 2i+1) instead of (i, i + rotary_dim / 2)
  float attention_factor = 1.0f;     // multiplies the rotated channels
  int64_t num_tables = 1;            // 1 or num_heads_kv
  const float* turns_hi = nullptr;   // (num_tables, rotary_dim / 2) turns per position, high part
  const float* turns_lo = nullptr;   // (num_tables, rotary_dim / 2) what the high part lost
  const float* positions = nullptr;  // (batch, seqlen_q); null: q_start + i
  const float* kv_positions = nullptr;  // (batch, seqlen_kv); null: j
  int64_t stride_positions_batch = 0;
  int64_t stride_kv_positions_batch = 0;
};

// Which keys a query sees. Query i sits at key index q_start[b] + i; in packed calls each sequence
// ends with its last key, so that q_start is seqlen_kv - seqlen_q of that sequence.
struct MaskParams {
  bool causal = true;
  // 0: none; else key j is visible iff j > i - window (and, unless causal, j < i + window).
  int64_t window = 0;
  const int32_t* q_start = nullptr;  // (batch); null: q_offset
  int64_t q_offset = 0;
  const int32_t* kv_start = nullptr;  // (batch); null: 0
  const int32_t* kv_end = nullptr;    // (batch); null: seqlen_kv
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, num_heads_q = 0, num_heads_kv = 0;
  int64_t seqlen_q = 0, seqlen_kv = 0;
  int64_t head_dim = 0;    // channels of q and k
  int64_t head_dim_v = 0;  // channels of v and out

  const void* q = nullptr;  // (batch, num_heads_q, seqlen_q, head_dim)
  const void* k = nullptr;  // (batch, num_heads_kv, seqlen_kv, head_dim)
  const void* v = nullptr;  // (batch, num_heads_kv, seqlen_kv, head_dim_v)
  int64_t stride_q_batch = 0, stride_q_head = 0, stride_q_row = 0;
  int64_t stride_k_batch = 0, stride_k_head = 0, stride_k_row = 0;
  int64_t stride_v_batch = 0, stride_v_head = 0, stride_v_row = 0;

  float scale = 1.0f;                 // multiplies q.k when scale_rows is null
  const float* scale_rows = nullptr;  // (batch, num_heads_q, seqlen_q)
  int64_t stride_scale_batch = 0, stride_scale_head = 0, stride_scale_row = 0;
  float softcap = 0.0f;  // 0: none; else s = softcap * tanh(s / softcap)

  // Packed calls: batch is 1, and sequence s owns the rows cu_seqlens[s] up to cu_seqlens[s + 1] of
  // q and of k, v. Null: not packed.
  const int32_t* cu_seqlens_q = nullptr;  // (num_seqs + 1)
  const int32_t* cu_seqlens_k = nullptr;  // (num_seqs + 1)
  int64_t num_seqs = 0;
  // Rows of a head in arrays that are called contiguous, where a call attends a part of them: one
  // sequence of a packed call. 0: seqlen_q, seqlen_kv.
  int64_t rows_q = 0, rows_kv = 0;

  int64_t head_rows_q() const { return rows_q > 0 ? rows_q : seqlen_q; }
  int64_t head_rows_kv() const { return rows_kv > 0 ? rows_kv : seqlen_kv; }

  MaskParams mask;
  RotaryParams rotary;
};

struct AttentionForwardParams : AttentionParams {
  void* out = nullptr;  // (batch, num_heads_q, seqlen_q, head_dim_v)
  int64_t stride_out_batch = 0, stride_out_head = 0, stride_out_row = 0;
  // (batch, num_heads_q, seqlen_q) contiguous, natural log, -inf for empty rows.
  float* lse = nullptr;
  // (2, batch, num_heads_q, seqlen_q) contiguous, what backward needs of a row: a, the largest
  // score t that it sees or one near it, then L = log2 of its sum of 2^exponent; 0 and inf where
  // it sees no key. Null: not saved.
  float* softmax_state = nullptr;
  // Rotated q and k, contiguous; null: not saved.
  void* q_prepared = nullptr;  // (batch, num_heads_q, seqlen_q, head_dim)
  void* k_prepared = nullptr;  // (batch, num_heads_kv, seqlen_kv, head_dim)

  int32_t* num_tiles_taken = nullptr;  // (1) scratch of persistent CUDA kernels
};

// k and v are the caches; seqlen_kv counts the keys that a row of them can hold. Row b holds
// cache_seqlens[b] keys before and seqlen_new more after the call, and its queries are the last
// seqlen_q of them: mask.q_start, mask.kv_end and the positions of rotary are not used.
struct AttentionDecodeParams : AttentionParams {
  void* k_cache = nullptr;  // k, written; with pages (num_pages, num_heads_kv, page_size, head_dim)
  void* v_cache =
      nullptr;  // v, written; with pages (num_pages, num_heads_kv, page_size, head_dim_v)
  bool rotated_cache = false;  // keys were rotated when appended; else they rotate when read
  const int32_t* cache_seqlens = nullptr;  // (batch)

  const int32_t* page_table = nullptr;  // (batch, pages_per_row); null: no pages
  int64_t stride_page_table_batch = 0;
  int64_t page_size = 0, pages_per_row = 0, num_pages = 0;

  int64_t seqlen_new = 0;
  const void* k_new = nullptr;  // (batch, num_heads_kv, seqlen_new, head_dim), not rotated
  const void* v_new = nullptr;  // (batch, num_heads_kv, seqlen_new, head_dim_v)
  int64_t stride_k_new_batch = 0, stride_k_new_head = 0, stride_k_new_row = 0;
  int64_t stride_v_new_batch = 0, stride_v_new_head = 0, stride_v_new_row = 0;

  void* out = nullptr;  // (batch, num_heads_q, seqlen_q, head_dim_v)
  int64_t stride_out_batch = 0, stride_out_head = 0, stride_out_row = 0;
  float* lse = nullptr;  // (batch, num_heads_q, seqlen_q) contiguous

  int64_t num_splits = 1;  // the keys of a row are shared by so many blocks
  // Unused when num_splits is 1.
  float* partial_out = nullptr;  // (num_splits, batch, num_heads_q, seqlen_q, head_dim_v)
  // (2, num_splits, batch, num_heads_q, seqlen_q): a_i of the part's keys, then the sum of
  // 2^(c'_i (t_ij - a_i)) over them, 0 where there are none.
  float* partial_state = nullptr;
};

// q and k of a backward call are the prepared ones; dq and dk leave un-rotated.
struct AttentionBackwardParams : AttentionParams {
  const void* out = nullptr;       // (batch, num_heads_q, seqlen_q, head_dim_v)
  const void* grad_out = nullptr;  // (batch, num_heads_q, seqlen_q, head_dim_v)
  int64_t stride_out_batch = 0, stride_out_head = 0, stride_out_row = 0;
  int64_t stride_grad_out_batch = 0, stride_grad_out_head = 0, stride_grad_out_row = 0;
  const float* softmax_state = nullptr;  // (2, batch, num_heads_q, seqlen_q) as forward saved it
  const float* grad_lse = nullptr;       // (batch, num_heads_q, seqlen_q) contiguous; null: zero
  void* grad_q = nullptr;                // (batch, num_heads_q, seqlen_q, head_dim)
  void* grad_k = nullptr;                // (batch, num_heads_kv, seqlen_kv, head_dim)
  void* grad_v = nullptr;                // (batch, num_heads_kv, seqlen_kv, head_dim_v)
  int64_t stride_grad_q_batch = 0, stride_grad_q_head = 0, stride_grad_q_row = 0;
  int64_t stride_grad_k_batch = 0, stride_grad_k_head = 0, stride_grad_k_row = 0;
  int64_t stride_grad_v_batch = 0, stride_grad_v_head = 0, stride_grad_v_row = 0;
  float* grad_scale = nullptr;  // (batch, num_heads_q, seqlen_q) contiguous; null: not wanted
};

}  // namespace drope
