// Tensor maps: how TMA (sm_90) sees the tensors of a call. Host code; a map is a kernel parameter.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention_params.h"

namespace drope::cuda {

// A (batch, num_heads, num_rows, channels) tensor of 16-bit elements with unit channel stride.
struct HeadTensor {
  const char* name;  // for messages
  DType dtype;
  const void* data;
  int64_t batch, num_heads, num_rows, channels;
  int64_t stride_batch, stride_head, stride_row;
};

inline HeadTensor queries_of(const AttentionParams& p) {
  return {"q",           p.dtype,          p.q,
          p.batch,       p.num_heads_q,    p.seqlen_q,
          p.head_dim,    p.stride_q_batch, p.stride_q_head,
          p.stride_q_row};
}

inline HeadTensor keys_of(const AttentionParams& p) {
  return {"k",           p.dtype,          p.k,
          p.batch,       p.num_heads_kv,   p.seqlen_kv,
          p.head_dim,    p.stride_k_batch, p.stride_k_head,
          p.stride_k_row};
}

inline HeadTensor values_of(const AttentionParams& p) {
  return {"v",           p.dtype,          p.v,
          p.batch,       p.num_heads_kv,   p.seqlen_kv,
          p.head_dim_v,  p.stride_v_batch, p.stride_v_head,
          p.stride_v_row};
}

// Dimensions (channels, rows, heads, batch), innermost first. The driver promises nothing about a
// stride of 0, so expanded heads and batches are a single one, which every coordinate times its
// step names: (channel, row, head * head_step, batch * batch_step).
struct HeadTensorMap {
  CUtensorMap map;
  int32_t head_step;
  int32_t batch_step;
};

// Whether TMA can read the tensor: it has rows, all different, and strides below 2^40 bytes.
bool has_tensor_map(const HeadTensor& tensor);

// A box is box_rows x box_channels; box_channels is a swizzle span (32, 64 or 128 bytes) of
// elements. What lies outside of the tensor reads as 0. Throws std::runtime_error with the tensor's
// name, dimensions, strides and box when the driver refuses or cannot be reached.
HeadTensorMap encode_tensor_map(const HeadTensor& tensor, int box_rows, int box_channels);

}  // namespace drope::cuda
