// Forward of few queries and no gradient: keys and values are read once, in place, where packing
// them would cost more than the products. The same loops as decode, over plain tensors.
#pragma once

#include "cpu/lanes/decode_splits.h"

namespace drope::DROPE_ISA {

// Of a head: forward has kLanes queries in a vector, however few there are, the splits multiply
// query by query. They break even at 16 queries (AVX-512, 4096 keys, groups of 1, 4 and 8).
inline constexpr int64_t kFewQueries = 3 * kLanes / 4;

// Backward needs what only the packing kernel keeps.
DROPE_INLINE bool has_few_queries(const AttentionForwardParams& p) {
  return 0 < p.seqlen_q && p.seqlen_q <= kFewQueries && p.num_heads_kv > 0 &&
         p.softmax_state == nullptr && p.q_prepared == nullptr && p.k_prepared == nullptr;
}

template <class Element, class Dot>
void attend_few_queries(const AttentionForwardParams& params, const CpuOptions& options) {
  AttentionDecodeParams p;
  static_cast<AttentionParams&>(p) = params;
  p.k_cache = const_cast<void*>(p.k);  // nothing is appended
  p.v_cache = const_cast<void*>(p.v);
  p.out = params.out;
  p.stride_out_batch = params.stride_out_batch;
  p.stride_out_head = params.stride_out_head;
  p.stride_out_row = params.stride_out_row;
  p.lse = params.lse;
  DecodeSplits<Element, Dot>(p, options).run();
}

}  // namespace drope::DROPE_ISA
