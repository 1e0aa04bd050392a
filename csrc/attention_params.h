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

// Which keys a query sees. Query i sits at key index q_start[b] + i.
struct MaskParams {
  bool causal = true;
  // 0: none; else key j is visible iff j > i - window (and, unless causal, j < i + window).
  int64_t window = 0;
  const int32_t* q_start = nullptr;   // (batch)
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

  MaskParams mask;
  RotaryParams rotary;
};

struct AttentionForwardParams : AttentionParams {
  void* out = nullptr;  // (batch, num_heads_q, seqlen_q, head_dim_v)
  int64_t stride_out_batch = 0, stride_out_head = 0, stride_out_row = 0;
  // (batch, num_heads_q, seqlen_q) contiguous, natural log, -inf for empty rows.
  float* lse = nullptr;
  // Rotated q and k, contiguous; null: not saved.
  void* q_prepared = nullptr;  // (batch, num_heads_q, seqlen_q, head_dim)
  void* k_prepared = nullptr;  // (batch, num_heads_kv, seqlen_kv, head_dim)
};

// q and k of a backward call are the prepared ones; dq and dk leave un-rotated.
struct AttentionBackwardParams : AttentionParams {
  const void* out = nullptr;       // (batch, num_heads_q, seqlen_q, head_dim_v)
  const void* grad_out = nullptr;  // (batch, num_heads_q, seqlen_q, head_dim_v)
  int64_t stride_out_batch = 0, stride_out_head = 0, stride_out_row = 0;
  int64_t stride_grad_out_batch = 0, stride_grad_out_head = 0, stride_grad_out_row = 0;
  const float* lse = nullptr;       // (batch, num_heads_q, seqlen_q) contiguous
  const float* grad_lse = nullptr;  // (batch, num_heads_q, seqlen_q) contiguous; null: zero
  void* grad_q = nullptr;           // (batch, num_heads_q, seqlen_q, head_dim)
  void* grad_k = nullptr;           // (batch, num_heads_kv, seqlen_kv, head_dim)
  void* grad_v = nullptr;           // (batch, num_heads_kv, seqlen_kv, head_dim_v)
  int64_t stride_grad_q_batch = 0, stride_grad_q_head = 0, stride_grad_q_row = 0;
  int64_t stride_grad_k_batch = 0, stride_grad_k_head = 0, stride_grad_k_row = 0;
  int64_t stride_grad_v_batch = 0, stride_grad_v_head = 0, stride_grad_v_row = 0;
  float* grad_scale = nullptr;  // (batch, num_heads_q, seqlen_q) contiguous; null: not wanted
};

}  // namespace drope
