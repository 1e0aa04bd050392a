// The one definition of rotating a pair of channels, for scalars, SIMD vectors and CUDA threads.
// V is float or any type with + - *, fused(a, b, c) = a*b + c rounded once, nearest(x), absolute(x)
// and splat<V>(float), found in the namespace of V or declared before this header.
#pragma once

#ifdef __CUDACC__
#define DROPE_ANYWHERE __host__ __device__ __forceinline__
#else
#define DROPE_ANYWHERE inline __attribute__((always_inline))
#endif

namespace drope {

template <class V>
struct SinCos {
  V sin, cos;
};

// -1 after an odd number of half turns, which turns both sin and cos around; else 1.
template <class V>
DROPE_ANYWHERE V half_turns_sign(V half_turns) {
  const V half = splat(V{}, 0.5f), minus_two = splat(V{}, -2.0f);
  const V parity = fused(nearest(half_turns * half), minus_two, half_turns);
  return fused(absolute(parity), minus_two, splat(V{}, 1.0f));
}

// sin and cos of 2 pi * position * (turns_hi + turns_lo); absolute error below 2e-7 while
// |position * turns| < 2^22 turns, and growing with the turns beyond. Splat is V's broadcast from
// float: splat(V{}, 1.0f).
template <class V>
DROPE_ANYWHERE SinCos<V> sincos_turns(V position, V turns_hi, V turns_lo) {
  const auto constant = [](float x) { return splat(V{}, x); };
  const V product = position * turns_hi;
  const V rounding = fused(position, turns_hi, constant(0.0f) - product);  // what `product` lost
  const V half_turns = nearest(product + product);
  // Both subtractions are exact, so the residual enters at the scale of the reduced angle.
  const V reduced = fused(half_turns, constant(-0.5f), product);
  const V near = reduced + fused(position, turns_lo, rounding);
  // From 2^20 turns on the residual alone reaches past the quarter turn of the polynomials.
  const V more_half_turns = nearest(near + near);
  const V turn = fused(more_half_turns, constant(-0.5f), near);  // in [-1/4, 1/4]
  const V sign = half_turns_sign(half_turns) * half_turns_sign(more_half_turns);

  // Minimax polynomials of sin(2 pi t) / t and (cos(2 pi t) - 1) / t^2 in t^2 on [0, 1/16].
  const V t2 = turn * turn;
  V s = constant(39.538868f);
  s = fused(s, t2, constant(-76.5501099f));
  s = fused(s, t2, constant(81.6010208f));
  s = fused(s, t2, constant(-41.3416557f));
  s = fused(s, t2, constant(6.28318501f));
  V c = constant(-25.0223331f);
  c = fused(c, t2, constant(60.1507149f));
  c = fused(c, t2, constant(-85.4539719f));
  c = fused(c, t2, constant(64.9393539f));
  c = fused(c, t2, constant(-19.7392082f));
  return {s * turn * sign, fused(c, t2, constant(1.0f)) * sign};
}

// Position-free: no angle, no work, no trace of rotation in the kernel that is given this policy.
struct NoPosition {};

// A rotation by `position` turns; Inverse undoes it (the transpose), attention_factor multiplies
// both.
struct Rotary {
  float attention_factor;
  float direction;  // +1 rotates, -1 applies the transpose

  template <class V>
  DROPE_ANYWHERE SinCos<V> angle(V position, V turns_hi, V turns_lo) const {
    SinCos<V> a = sincos_turns(position, turns_hi, turns_lo);
    a.sin = a.sin * splat(V{}, direction * attention_factor);
    a.cos = a.cos * splat(V{}, attention_factor);
    return a;
  }

  template <class V>
  static DROPE_ANYWHERE void rotate_pair(V& x1, V& x2, const SinCos<V>& a) {
    const V y1 = x1 * a.cos - x2 * a.sin;
    x2 = x2 * a.cos + x1 * a.sin;
    x1 = y1;
  }
};

}  // namespace drope
