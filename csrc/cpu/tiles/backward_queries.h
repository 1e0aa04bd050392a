// The ends of the backward pass of a query block: queries and their output gradients in,
// dQ and dscale out.
#pragma once

#include "cpu/backward_rows.h"
#include "cpu/tiles/backward_block.h"

namespace drope::DROPE_ISA {

// Lane i is the dot product of rows i of a and b, 0 from row `rows` on. Its sums are formed in one
// order, whatever the vectors are made of.
template <class A, class B>
Vec dot_each_row(const typename A::Storage* a, int64_t stride_a, const typename B::Storage* b,
                 int64_t stride_b, int rows, int64_t count) {
  Vec sums[kLanes];
  for (int row = 0; row < kLanes; ++row, a += stride_a, b += stride_b) {
    Vec sum = zero();
    if (row < rows) {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) sum = fma(A::load(a + i), B::load(b + i), sum);
      const int rest = static_cast<int>(count - i);
      if (rest > 0) sum = fma(A::load(a + i, rest), B::load(b + i, rest), sum);
    }
    sums[row] = sum;
  }
  transpose(sums);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
  return sums[0];
}

// The softmax state of a vector of queries; L is inf where there is no query.
struct VecState {
  Vec reference, log2_sum, grad_lse;

  VecState(const AttentionBackwardParams& p, const QueryRows& rows, int count) {
    const int64_t row = (rows.batch * p.num_heads_q + rows.head) * p.head_rows_q() + rows.first;
    const float* const log2_sums = p.softmax_state + p.batch * p.num_heads_q * p.head_rows_q();
    alignas(64) float state[3][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const bool some = i < count;
      state[0][i] = some ? p.softmax_state[row + i] : 0.0f;
      state[1][i] = some ? log2_sums[row + i] : kInfinity;
      state[2][i] = some && p.grad_lse != nullptr ? p.grad_lse[row + i] : 0.0f;
    }
    reference = load(state[0]);
    log2_sum = load(state[1]);
    grad_lse = load(state[2]);
  }
};

// Queries past the end and queries that saw no key get minus_log2_sum = -inf: their probabilities,
// and with them all they add to, are exactly 0.
inline void load_row_terms(const AttentionBackwardParams& p, const QueryRows& rows, int v,
                           RowTerms& terms) {
  const int count = static_cast<int>(std::clamp<int64_t>(p.seqlen_q - rows.first, 0, kLanes));
  const VecState state(p, rows, count);
  const Matrix<BFloat16> out = out_matrix<BFloat16>(p, rows);
  const Matrix<BFloat16> grad_out = grad_out_matrix<BFloat16>(p, rows);
  const Vec dots = dot_each_row<BFloat16, BFloat16>(
      out.data + rows.first * out.stride_row, out.stride_row,
      grad_out.data + rows.first * grad_out.stride_row, grad_out.stride_row, count, p.head_dim_v);
  const Mask empty = equal(state.log2_sum, broadcast(kInfinity));
  terms.reference[v] = state.reference;
  terms.minus_log2_sum[v] = zero() - state.log2_sum;
  terms.scale[v] = count > 0 ? query_scales(p, rows.batch, rows.head, rows.first) : zero();
  terms.scale_log2[v] = scale_to_log2(terms.scale[v], 0.0f);
  terms.minus_delta[v] = select(empty, zero(), terms.scale[v] * (state.grad_lse - dots));
}

// Rows that see no key are loaded as 0, like those past the end: they may be NaN.
template <int kDim>
void load_slice(const AttentionBackwardParams& p, const QueryRows& rows, int slice, int64_t origin,
                QueryBlock& queries) {
  constexpr int kSteps = Channels<kDim>::kSteps, kTiles = Channels<kDim>::kTiles;
  TileRange<kSliceVecs>& range = queries.ranges[slice];
  range = TileRange<kSliceVecs>(p, rows.batch, rows.first, origin);
  if (rows.first >= p.seqlen_q) range.any = {0, 0};
  const KeyRange lanes = range.seeing_lanes();
  const KeyRange seeing{rows.first + lanes.begin, std::min(rows.first + lanes.end, p.seqlen_q)};
  const Matrix<BFloat16> q = only_rows(query_matrix<BFloat16>(p, rows), seeing);
  const Matrix<BFloat16> grad_out = only_rows(grad_out_matrix<BFloat16>(p, rows), seeing);
  for (int v = 0; v < kSliceVecs; ++v) {
    const int64_t row = v * kLanes - lanes.begin;
    const int64_t tile = (slice * kSliceVecs + v) * kSteps * kTile;
    pack_columns(NoPosition{}, q, row, kSteps, queries.q_columns + tile);
    pack_columns(NoPosition{}, grad_out, row, kSteps, queries.grad_out_columns + tile);
    load_row_terms(p, {rows.batch, rows.head, rows.kv_head, rows.first + v * kLanes}, v,
                   queries.terms[slice]);
  }
  pack_pairs(q, -lanes.begin, kTiles, queries.q_pairs + slice * kTiles * kTile);
  pack_pairs(grad_out, -lanes.begin, kTiles, queries.grad_out_pairs + slice * kTiles * kTile);
}

template <int kDim>
void load_queries(const AttentionBackwardParams& p, QueryRows rows, int64_t origin,
                  QueryBlock& queries) {
  for (int slice = 0; slice < kSlices; ++slice, rows.first += kSliceQueries) {
    load_slice<kDim>(p, rows, slice, origin, queries);
  }
  clear_tiles(queries.grad_q, kBlockQueries * kDim / kTile);
}

// kLanes rows of dQ from its sums (tiles of channels, kSliceVecs), whose lanes they are.
template <int kDim>
DROPE_INLINE void gather_rows(const float* sums, float (&rows)[kLanes][kDim]) {
  for (int tile = 0; tile < Channels<kDim>::kTiles; ++tile) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load(sums + i * kLanes);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(rows[i] + tile * kLanes, block[i]);
    sums += kSliceVecs * kTile;
  }
}

// dscale_i = sum_j dS_ij q_i.k_j = q_i.dQ_i with dQ still rotated and not yet scaled.
template <int kDim>
void store_grad_scale(const AttentionBackwardParams& p, const QueryRows& rows, int count,
                      const RowTerms& terms, int v, const float (&grad_q)[kLanes][kDim]) {
  const Matrix<BFloat16> q = query_matrix<BFloat16>(p, rows);
  const Vec dots = dot_each_row<BFloat16, Float32>(q.data + rows.first * q.stride_row, q.stride_row,
                                                   grad_q[0], kDim, count, p.head_dim);
  const Mask empty = equal(terms.minus_log2_sum[v], broadcast(-kInfinity));
  const int64_t row = (rows.batch * p.num_heads_q + rows.head) * p.head_rows_q() + rows.first;
  Float32::store(p.grad_scale + row, select(empty, zero(), dots / terms.scale[v]), count);
}

template <int kDim>
void store_queries(const AttentionBackwardParams& p, QueryRows rows, const QueryBlock& queries) {
  uint16_t* grad_q = static_cast<uint16_t*>(p.grad_q) + rows.batch * p.stride_grad_q_batch +
                     rows.head * p.stride_grad_q_head;
  const RotaryRows rotation = undo_query_rotation(p, rows);
  alignas(64) float stage[kLanes][kDim];
  for (int i = 0; i < kSlices * kSliceVecs && rows.first < p.seqlen_q; ++i) {
    const int slice = i / kSliceVecs, v = i % kSliceVecs;
    gather_rows<kDim>(queries.grad_q + slice * kSliceQueries * kDim + v * kTile, stage);
    const int count = static_cast<int>(std::min<int64_t>(kLanes, p.seqlen_q - rows.first));
    for (int row = 0; row < count; ++row) {
      store_unrotated<BFloat16>(rotation, rows.first + row, stage[row], p.head_dim,
                                grad_q + (rows.first + row) * p.stride_grad_q_row);
    }
    if (p.grad_scale != nullptr) {
      store_grad_scale<kDim>(p, rows, count, queries.terms[slice], v, stage);
    }
    rows.first += kLanes;
  }
}

}  // namespace drope::DROPE_ISA
