// The end of the forward pass of kLanes queries: out, lse and what backward needs of the softmax.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/softmax.h"

namespace drope::DROPE_ISA {

struct FirstQuery {
  int64_t batch, head, query;
};

// Of lse and softmax_state, the rows that exist. Rows that saw no key have a maximum of -inf.
inline void store_row_states(const AttentionForwardParams& p, const FirstQuery& at, int rows,
                             Vec row_max, Vec row_sum) {
  const Mask empty = equal(row_max, broadcast(-kInfinity));
  const bool capped = p.softcap > 0.0f;
  const Vec seen_max = capped ? row_max * broadcast(1.0f / kCapUnit) : row_max;
  const Vec reference = select(empty, zero(), seen_max);
  const Vec log2_sum = log2(row_sum);
  // The natural logarithm, rounded once it is whole: for users, never for a gradient.
  const Vec scale = capped ? broadcast(p.softcap) : query_scales(p, at.batch, at.head, at.query);
  const Vec lse = fused(scale, reference, broadcast(kLn2) * log2_sum);
  const int64_t row = (at.batch * p.num_heads_q + at.head) * p.head_rows_q() + at.query;
  Float32::store(p.lse + row, select(empty, broadcast(-kInfinity), lse), rows);
  if (p.softmax_state == nullptr) return;
  float* state = p.softmax_state + row;
  Float32::store(state, reference, rows);
  Float32::store(state + p.batch * p.num_heads_q * p.head_rows_q(),
                 select(empty, broadcast(kInfinity), log2_sum), rows);
}

// Normalises the queries that exist and stores their rows. Channel c of all of them starts at
// acc_o + c / kLanes * stride_channels + c % kLanes * stride_channel.
template <class Element>
void store_queries(const AttentionForwardParams& p, const FirstQuery& at, Vec row_max, Vec row_sum,
                   const float* acc_o, int64_t stride_channel, int64_t stride_channels) {
  const int rows = static_cast<int>(std::min<int64_t>(kLanes, p.seqlen_q - at.query));
  const Vec inverse = select(equal(row_sum, zero()), zero(), broadcast(1.0f) / row_sum);
  store_row_states(p, at, rows, row_max, row_sum);
  auto* out = static_cast<typename Element::Storage*>(p.out) + at.batch * p.stride_out_batch +
              at.head * p.stride_out_head + at.query * p.stride_out_row;
  const int64_t stride_row = p.stride_out_row, num_channels = p.head_dim_v;
  for (int64_t channel = 0; channel < num_channels; channel += kLanes, acc_o += stride_channels) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load(acc_o + i * stride_channel) * inverse;
    transpose(block);
    const int channels = static_cast<int>(std::min<int64_t>(kLanes, num_channels - channel));
    auto* row = out + channel;
    if (rows == kLanes && channels == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) Element::store(row + i * stride_row, block[i]);
    } else {
      for (int i = 0; i < rows; ++i) {
        Element::store(row + i * stride_row, block[i], channels);
      }
    }
  }
}

}  // namespace drope::DROPE_ISA
