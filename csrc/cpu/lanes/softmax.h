// Powers of two and tanh, lane by lane, and the running maximum and sum of a softmax.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention_params.h"
#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x for x < 128, relative error 7.5e-8 before rounding; exactly 0 at -infinity.
DROPE_INLINE Vec exp2(Vec x) {
  const Vec part = fraction(x);
  Vec p = broadcast(0.00187757669f);
  p = fma(p, part, broadcast(0.00898933969f));
  p = fma(p, part, broadcast(0.0558263175f));
  p = fma(p, part, broadcast(0.240153611f));
  p = fma(p, part, broadcast(0.693153083f));
  p = fma(p, part, broadcast(0.99999994f));
  return times_two_to_floor(p, x);
}

// 2^x with relative error 2.6e-6: for probabilities that are rounded to bf16 (4e-3) next.
DROPE_INLINE Vec exp2_for_bf16(Vec x) {
  const Vec part = fraction(x);
  Vec p = broadcast(0.0135341678f);
  p = fma(p, part, broadcast(0.0520114601f));
  p = fma(p, part, broadcast(0.241442755f));
  p = fma(p, part, broadcast(0.693003833f));
  p = fma(p, part, broadcast(1.00000262f));
  return times_two_to_floor(p, x);
}

// tanh with a relative error of a few ulp at every x: expm1(2|x|) is formed without cancellation.
DROPE_INLINE Vec tanh(Vec x) {
  const Vec magnitude = min(broadcast(13.0f), absolute(x));  // tanh(13) rounds to 1
  const Vec y = magnitude * broadcast(2.0f * kLog2E);
  const Vec whole = nearest(y);
  const Vec part = y - whole;
  Vec p = broadcast(0.000154035137f);
  p = fma(p, part, broadcast(0.00133907353f));
  p = fma(p, part, broadcast(0.00961823761f));
  p = fma(p, part, broadcast(0.0555035733f));
  p = fma(p, part, broadcast(0.240226492f));
  p = fma(p, part, broadcast(0.693147182f));
  const Vec power = times_two_to_floor(broadcast(1.0f), whole);
  const Vec expm1 = fma(p * part, power, power - broadcast(1.0f));
  return copy_sign(expm1 / (expm1 + broadcast(2.0f)), x);
}

// The logit scales of queries [query, query + kLanes); lanes past the last query repeat it.
DROPE_INLINE Vec query_scales(const AttentionParams& p, int64_t batch, int64_t head,
                              int64_t query) {
  if (p.scale_rows == nullptr) return broadcast(p.scale);
  const float* rows = p.scale_rows + batch * p.stride_scale_batch + head * p.stride_scale_head;
  alignas(64) float scales[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    scales[i] = rows[std::min(query + i, p.seqlen_q - 1) * p.stride_scale_row];
  }
  return load(scales);
}

// exp2 as precise as the operand of the product that follows needs it.
template <class Dot>
DROPE_INLINE Vec probability(Vec log2_p) {
  if constexpr (Dot::kDepth == 2) {
    return exp2_for_bf16(log2_p);
  } else {
    return exp2(log2_p);
  }
}

}  // namespace drope::DROPE_ISA
