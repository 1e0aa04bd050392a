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

inline void store_row_state(const AttentionForwardParams& p, const FirstQuery& at, int64_t i,
                            const RowSoftmax& softmax) {
  const int64_t row = (at.batch * p.num_heads_q + at.head) * p.head_rows_q() + at.query + i;
  p.lse[row] = softmax.lse(scale_of_row(p, at.batch, at.head, at.query + i), p.softcap);
  if (p.softmax_state == nullptr) return;
  p.softmax_state[row] = softmax.reference(p.softcap);
  p.softmax_state[p.batch * p.num_heads_q * p.head_rows_q() + row] = softmax.log2_sum();
}

// Normalises the queries that exist and stores their rows. Channel c of all of them starts at
// acc_o + c / kLanes * stride_channels + c % kLanes * stride_channel.
template <class Element>
void store_queries(const AttentionForwardParams& p, const FirstQuery& at, Vec row_max, Vec row_sum,
                   const float* acc_o, int64_t stride_channel, int64_t stride_channels) {
  const int rows = static_cast<int>(std::min<int64_t>(kLanes, p.seqlen_q - at.query));
  const Vec inverse = select(equal(row_sum, zero()), zero(), broadcast(1.0f) / row_sum);
  float sums[kLanes], maxima[kLanes];
  store(sums, row_sum);
  store(maxima, row_max);
  for (int i = 0; i < rows; ++i) store_row_state(p, at, i, {maxima[i], sums[i]});
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
