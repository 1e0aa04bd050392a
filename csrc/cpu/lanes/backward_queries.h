// The ends of the backward pass of one tile: queries and their output gradients in, dQ and dscale
// out.
#pragma once

#include <cmath>

#include "cpu/backward_rows.h"
#include "cpu/lanes/backward_tile.h"

namespace drope::DROPE_ISA {

template <class A, class B>
DROPE_INLINE float dot_rows(const typename A::Storage* a, const typename B::Storage* b,
                            int64_t count) {
  Vec sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = fma(A::load(a + i), B::load(b + i), sum);
  const int rest = static_cast<int>(count - i);
  if (rest > 0) sum = fma(A::load(a + i, rest), B::load(b + i, rest), sum);
  return sum_lanes(sum);
}

// The terms of every query of a tile. Queries past the end and queries that saw no key get
// minus_log2_sum = -inf: their probabilities, and with them all they add to, are exactly 0.
template <class Element, class Dot>
void load_row_terms(const AttentionBackwardParams& p, const QueryRows& rows,
                    const BackwardTile<Dot>& tile) {
  const Matrix<Element> out = out_matrix<Element>(p, rows);
  const Matrix<Element> grad_out = grad_out_matrix<Element>(p, rows);
  const int64_t head_row = (rows.batch * p.num_heads_q + rows.head) * p.head_rows_q();
  const float* const references = p.softmax_state + head_row;
  const float* const log2_sums = references + p.batch * p.num_heads_q * p.head_rows_q();
  for (int64_t i = 0; i < kBlockQ; ++i) {
    const int64_t row = rows.first + i;
    const bool empty = row >= p.seqlen_q || log2_sums[row] == kInfinity;
    tile.scale[i] = row < p.seqlen_q ? scale_of_row(p, rows.batch, rows.head, row) : 0.0f;
    tile.reference[i] = 0.0f;
    tile.minus_log2_sum[i] = -kInfinity;
    tile.minus_delta[i] = 0.0f;
    if (empty) continue;
    tile.reference[i] = (p.softcap > 0.0f ? kCapUnit : 1.0f) * references[row];
    tile.minus_log2_sum[i] = -log2_sums[row];
    const float grad_lse = p.grad_lse != nullptr ? p.grad_lse[head_row + row] : 0.0f;
    const float delta =
        dot_rows<Element, Element>(out.data + row * out.stride_row,
                                   grad_out.data + row * grad_out.stride_row, p.head_dim_v) -
        grad_lse;
    tile.minus_delta[i] = -tile.scale[i] * delta;
  }
  for (int64_t i = 0; i < kBlockQ; i += kLanes) {
    store(tile.scale_log2 + i, scale_to_log2(load(tile.scale + i), p.softcap));
  }
}

// Rows that see no key are loaded as 0, like those past the end: they may be NaN.
template <class Element, class Dot>
void load_queries(const AttentionBackwardParams& p, const QueryRows& rows, int64_t origin,
                  BackwardTile<Dot>& tile) {
  tile.range = TileRange<kMaxVecs>(p, rows.batch, rows.first, origin);
  const KeyRange lanes = tile.range.seeing_lanes();
  const KeyRange seeing{rows.first + lanes.begin, std::min(rows.first + lanes.end, p.seqlen_q)};
  const Matrix<Element> q = only_rows(query_matrix<Element>(p, rows), seeing);
  const Matrix<Element> grad_out = only_rows(grad_out_matrix<Element>(p, rows), seeing);
  pack_lanes<Dot, kMaxVecs>(NoPosition{}, q, -lanes.begin, tile.q_lanes);
  pack_lanes<Dot, kMaxVecs>(NoPosition{}, grad_out, -lanes.begin, tile.grad_out_lanes);
  pack_channel_lanes<Dot>(q, -lanes.begin, kBlockQ, tile.q_rows);
  pack_channel_lanes<Dot>(grad_out, -lanes.begin, kBlockQ, tile.grad_out_rows);
  load_row_terms<Element>(p, rows, tile);
  std::memset(tile.grad_q_lanes, 0, sizeof(float) * tile.channels() * kBlockQ);
}

// dscale_i = sum_j dS_ij q_i.k_j = q_i.dQ_i with dQ still rotated and not yet scaled.
template <class Element, class Dot>
void store_queries(const AttentionBackwardParams& p, const QueryRows& rows,
                   const BackwardTile<Dot>& tile) {
  using Storage = typename Element::Storage;
  Storage* grad_q = static_cast<Storage*>(p.grad_q) + rows.batch * p.stride_grad_q_batch +
                    rows.head * p.stride_grad_q_head;
  const int64_t head_row = (rows.batch * p.num_heads_q + rows.head) * p.head_rows_q();
  const Matrix<Element> q = query_matrix<Element>(p, rows);
  const RotaryRows rotation = undo_query_rotation(p, rows);
  alignas(64) float stage[kLanes][kMaxHeadDim];
  for (int64_t first = 0; first < kBlockQ; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, p.seqlen_q - rows.first - first);
    for (int64_t channel = 0; channel < p.head_dim; channel += kLanes) {
      Vec column[kLanes];
      const float* lanes = tile.grad_q_lanes + channel * kBlockQ + first;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) column[i] = load(lanes + i * kBlockQ);
      transpose(column);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(stage[i] + channel, column[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows.first + first + i;
      store_unrotated<Element>(rotation, row, stage[i], p.head_dim,
                               grad_q + row * p.stride_grad_q_row);
      if (p.grad_scale == nullptr) continue;
      const float* q_row_grad = stage[i];
      const bool empty = tile.minus_log2_sum[first + i] == -kInfinity;
      p.grad_scale[head_row + row] =
          empty ? 0.0f
                : dot_rows<Element, Float32>(q.data + row * q.stride_row, q_row_grad, p.head_dim) /
                      tile.scale[first + i];
    }
  }
}

}  // namespace drope::DROPE_ISA
