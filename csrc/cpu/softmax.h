// Powers of two and tanh, lane by lane, and what scores are to a softmax: t, and its exponent of 2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

// log2 of positive numbers, absolute error 1e-7; 0, infinity and NaN stay as they are.
DROPE_INLINE Vec log2(Vec x) {
  constexpr float kTwoOverLn2 = 2.88539008177792681f;
  constexpr uint32_t kRootOfHalf = 0x3f3504f3u;  // mantissas from there to twice as much
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  // A loop that a compiler turns into vectors, integer ones too, which Vec has no words for.
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits;
    std::memcpy(&bits, lanes + i, sizeof bits);
    const int32_t exponent = static_cast<int32_t>(bits - kRootOfHalf) >> 23;
    bits -= static_cast<uint32_t>(exponent) << 23;
    float mantissa;
    std::memcpy(&mantissa, &bits, sizeof bits);
    const float s = (mantissa - 1.0f) / (mantissa + 1.0f), s2 = s * s;
    float p = kTwoOverLn2 / 9.0f;
    p = p * s2 + kTwoOverLn2 / 7.0f;
    p = p * s2 + kTwoOverLn2 / 5.0f;
    p = p * s2 + kTwoOverLn2 / 3.0f;
    p = p * s2 + kTwoOverLn2;
    const float log2_x = static_cast<float>(exponent) + s * p;
    lanes[i] = lanes[i] > 0.0f && lanes[i] < kInfinity ? log2_x : lanes[i];
  }
  return load(lanes);
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

// --- scores and their exponents ------------------------------------------------------------------
//
// Of a row with logit scale c, a score t is the product q.k, or with a softcap 2 tanh(c q.k /
// softcap). Forward and backward form it by the same operations, so that its bits are the same, and
// take its exponent against the same reference, the row's maximum of t: ratios of probabilities and
// their sum are exact however large the scores are.

// scale_log2, from differences of t to exponents. The 2 of a capped t keeps it finite for every
// softcap; it is of the kernels alone, softmax_state counts a in tanh.
inline constexpr float kCapUnit = 2.0f;
DROPE_INLINE Vec scale_to_log2(Vec scale, float softcap) {
  return softcap > 0.0f ? broadcast(kLog2E / kCapUnit * softcap) : broadcast(kLog2E) * scale;
}

// The capped t of a product. Two products, as scale / softcap may be too small for a float.
DROPE_INLINE Vec cap_score(Vec product, Vec scale, Vec inverse_softcap) {
  return broadcast(kCapUnit) * tanh(product * scale * inverse_softcap);
}

// The power of 2 that a score t contributes, less log2_sum, all of a row: 0 in forward, in backward
// what makes it the probability. The difference first: it is exact near the reference and never
// above 0, and its product with the factor rounds what remains, however large t is. An fma for both
// passes: it costs what the product alone would, and rounds no more.
DROPE_INLINE Vec exponent(Vec t, Vec reference, Vec scale_log2, Vec minus_log2_sum) {
  return fma(scale_log2, t - reference, minus_log2_sum);
}

// 2^exponent of one reference against a larger one: brings what was summed by it to the other.
// Exactly 1 if it stays: exp2(0) is not, and would fade early keys block by block.
DROPE_INLINE Vec rescale(Vec reference, Vec earlier, Vec scale_log2) {
  return select(equal(earlier, reference), broadcast(1.0f),
                exp2(exponent(earlier, reference, scale_log2, zero())));
}

// Logit scale of one query.
DROPE_INLINE float scale_of_row(const AttentionParams& p, int64_t batch, int64_t head,
                                int64_t row) {
  if (p.scale_rows == nullptr) return p.scale;
  return p.scale_rows[batch * p.stride_scale_batch + head * p.stride_scale_head +
                      row * p.stride_scale_row];
}

// The logit scales of queries [query, query + kLanes); lanes past the last query repeat it.
DROPE_INLINE Vec query_scales(const AttentionParams& p, int64_t batch, int64_t head,
                              int64_t query) {
  if (p.scale_rows == nullptr) return broadcast(p.scale);
  alignas(64) float scales[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    scales[i] = scale_of_row(p, batch, head, std::min(query + i, p.seqlen_q - 1));
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

// What is left of the row of one query when its softmax is done: the largest t, the sum of 2^
// exponent. A row that saw no key has -inf and 0.
struct RowSoftmax {
  float row_max, row_sum;

  bool empty() const { return row_max == -kInfinity; }
  float log2_sum() const { return empty() ? kInfinity : std::log2(row_sum); }
  // softmax_state's a.
  float reference(float softcap) const {
    return empty() ? 0.0f : softcap > 0.0f ? row_max / kCapUnit : row_max;
  }
  // The natural logarithm, rounded once it is whole: for users, never for a gradient.
  float lse(float scale, float softcap) const {
    if (empty()) return -kInfinity;
    return std::fma(softcap > 0.0f ? softcap : scale, reference(softcap), kLn2 * log2_sum());
  }
};

}  // namespace drope::DROPE_ISA
