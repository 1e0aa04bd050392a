#include "cpu/packed.h"

#include <type_traits>

namespace drope {

namespace {

// `x` from row `row` on, where rows are `stride` elements apart; null stays null.
template <class Pointer>
Pointer from_row(Pointer x, int64_t row, int64_t stride, DType dtype) {
  if (x == nullptr) return nullptr;
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(x) + row * stride * (dtype == DType::kFloat32 ? 4 : 2);
}

template <class Number>
Number* from(Number* x, int64_t row, int64_t stride = 1) {
  return x == nullptr ? nullptr : x + row * stride;
}

struct Rows {
  int64_t q, kv;  // the first ones of a sequence
};

Rows restrict(const AttentionParams& packed, int64_t s, AttentionParams& p) {
  const Rows first{packed.cu_seqlens_q[s], packed.cu_seqlens_k[s]};
  p.cu_seqlens_q = p.cu_seqlens_k = nullptr;
  p.num_seqs = 0;
  p.rows_q = packed.seqlen_q;
  p.rows_kv = packed.seqlen_kv;
  p.seqlen_q = packed.cu_seqlens_q[s + 1] - first.q;
  p.seqlen_kv = packed.cu_seqlens_k[s + 1] - first.kv;
  p.mask.q_offset = p.seqlen_kv - p.seqlen_q;
  p.q = from_row(p.q, first.q, p.stride_q_row, p.dtype);
  p.k = from_row(p.k, first.kv, p.stride_k_row, p.dtype);
  p.v = from_row(p.v, first.kv, p.stride_v_row, p.dtype);
  p.scale_rows = from(p.scale_rows, first.q, p.stride_scale_row);
  p.rotary.positions = from(p.rotary.positions, first.q);
  p.rotary.kv_positions = from(p.rotary.kv_positions, first.kv);
  return first;
}

}  // namespace

AttentionForwardParams sequence_of(const AttentionForwardParams& packed, int64_t s) {
  AttentionForwardParams p = packed;
  const Rows first = restrict(packed, s, p);
  p.out = from_row(p.out, first.q, p.stride_out_row, p.dtype);
  p.lse = from(p.lse, first.q);
  p.softmax_state = from(p.softmax_state, first.q);
  p.q_prepared = from_row(p.q_prepared, first.q, p.head_dim, p.dtype);
  p.k_prepared = from_row(p.k_prepared, first.kv, p.head_dim, p.dtype);
  return p;
}

AttentionBackwardParams sequence_of(const AttentionBackwardParams& packed, int64_t s) {
  AttentionBackwardParams p = packed;
  const Rows first = restrict(packed, s, p);
  p.out = from_row(p.out, first.q, p.stride_out_row, p.dtype);
  p.grad_out = from_row(p.grad_out, first.q, p.stride_grad_out_row, p.dtype);
  p.softmax_state = from(p.softmax_state, first.q);
  p.grad_lse = from(p.grad_lse, first.q);
  p.grad_q = from_row(p.grad_q, first.q, p.stride_grad_q_row, p.dtype);
  p.grad_k = from_row(p.grad_k, first.kv, p.stride_grad_k_row, p.dtype);
  p.grad_v = from_row(p.grad_v, first.kv, p.stride_grad_v_row, p.dtype);
  p.grad_scale = from(p.grad_scale, first.q);
  return p;
}

}  // namespace drope
