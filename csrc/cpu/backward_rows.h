// Rows of the matrices that a backward pass reads and writes.
#pragma once

#include <cstdint>

#include "cpu/rotary.h"

namespace drope::DROPE_ISA {

// Queries of one head, from `first` on.
struct QueryRows {
  int64_t batch, head, kv_head, first;
};

template <class Element>
DROPE_INLINE Matrix<Element> query_matrix(const AttentionBackwardParams& p, const QueryRows& rows) {
  using Storage = typename Element::Storage;
  return {static_cast<const Storage*>(p.q) + rows.batch * p.stride_q_batch +
              rows.head * p.stride_q_head,
          p.stride_q_row, p.seqlen_q, p.head_dim};
}

template <class Element>
DROPE_INLINE Matrix<Element> out_matrix(const AttentionBackwardParams& p, const QueryRows& rows) {
  using Storage = typename Element::Storage;
  return {static_cast<const Storage*>(p.out) + rows.batch * p.stride_out_batch +
              rows.head * p.stride_out_head,
          p.stride_out_row, p.seqlen_q, p.head_dim_v};
}

template <class Element>
DROPE_INLINE Matrix<Element> grad_out_matrix(const AttentionBackwardParams& p,
                                             const QueryRows& rows) {
  using Storage = typename Element::Storage;
  return {static_cast<const Storage*>(p.grad_out) + rows.batch * p.stride_grad_out_batch +
              rows.head * p.stride_grad_out_head,
          p.stride_grad_out_row, p.seqlen_q, p.head_dim_v};
}

template <class Element>
DROPE_INLINE Matrix<Element> key_matrix(const AttentionBackwardParams& p, int64_t batch,
                                        int64_t kv_head) {
  using Storage = typename Element::Storage;
  return {static_cast<const Storage*>(p.k) + batch * p.stride_k_batch + kv_head * p.stride_k_head,
          p.stride_k_row, p.seqlen_kv, p.head_dim};
}

template <class Element>
DROPE_INLINE Matrix<Element> value_matrix(const AttentionBackwardParams& p, int64_t batch,
                                          int64_t kv_head) {
  using Storage = typename Element::Storage;
  return {static_cast<const Storage*>(p.v) + batch * p.stride_v_batch + kv_head * p.stride_v_head,
          p.stride_v_row, p.seqlen_kv, p.head_dim_v};
}

// x without the rows outside `rows`, which pack as 0. Row rows.begin of x is row 0.
template <class Element>
DROPE_INLINE Matrix<Element> only_rows(const Matrix<Element>& x, KeyRange rows) {
  return {x.data + rows.begin * x.stride_row, x.stride_row, rows.end - rows.begin, x.dim};
}

// A float32 gradient of a prepared row leaves un-rotated and rounded once.
template <class Element>
DROPE_INLINE void store_unrotated(const RotaryRows& rotation, int64_t row, const float* grad,
                                  int64_t count, typename Element::Storage* to) {
  if (rotation.dim > 0) {
    copy_row<Float32, Element>(rotation, row, grad, to, count);
  } else {
    copy_row<Float32, Element>(NoPosition{}, row, grad, to, count);
  }
}

// The rotation that takes a gradient of prepared queries, or keys, back.
DROPE_INLINE RotaryRows undo_query_rotation(const AttentionBackwardParams& p,
                                            const QueryRows& rows) {
  if (p.rotary.rotary_dim == 0) return {};
  return query_rotation(p, rows.batch, rows.kv_head, -1.0f);
}
DROPE_INLINE RotaryRows undo_key_rotation(const AttentionBackwardParams& p, int64_t batch,
                                          int64_t kv_head) {
  if (p.rotary.rotary_dim == 0) return {};
  return key_rotation(p, batch, kv_head, -1.0f);
}

}  // namespace drope::DROPE_ISA
