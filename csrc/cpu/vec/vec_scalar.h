// Portable: 4 lanes of the compiler's vector extension, which any CPU has registers for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

inline constexpr int kLanes = 4;
inline constexpr int kRows = 4;     // micro-kernel: kRows x kMaxVecs accumulators
inline constexpr int kMaxVecs = 2;  // of 16 registers, which also hold the products

using NativeFloat = float __attribute__((vector_size(16)));
using NativeInt = int32_t __attribute__((vector_size(16)));

struct Vec {
  NativeFloat v;
};
struct Mask {
  NativeInt m;
};

DROPE_INLINE Vec broadcast(float x) { return {NativeFloat{x, x, x, x}}; }
DROPE_INLINE Vec splat(Vec, float x) { return broadcast(x); }
DROPE_INLINE Vec zero() { return broadcast(0.0f); }
DROPE_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
DROPE_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

DROPE_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
DROPE_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
DROPE_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
DROPE_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Rounded once, in software where the baseline has no FMA: for angles, not for matrix products.
DROPE_INLINE Vec fused(Vec a, Vec b, Vec c) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return r;
}
DROPE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }

DROPE_INLINE Mask less(Vec a, Vec b) { return {a.v < b.v}; }
DROPE_INLINE Mask less_equal(Vec a, Vec b) { return {a.v <= b.v}; }
DROPE_INLINE Mask equal(Vec a, Vec b) { return {a.v == b.v}; }
DROPE_INLINE Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
DROPE_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {(NativeFloat)((m.m & (NativeInt)yes.v) | (~m.m & (NativeInt)no.v))};
}
// max(a, NaN) is NaN: the second operand wins.
DROPE_INLINE Vec max(Vec a, Vec b) { return select(less(b, a), a, b); }
DROPE_INLINE Vec min(Vec a, Vec b) { return select(less(a, b), a, b); }
DROPE_INLINE Vec absolute(Vec x) { return {(NativeFloat)((NativeInt)x.v & 0x7fffffff)}; }
DROPE_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  const NativeInt sign_bit = (NativeInt)sign.v & ~0x7fffffff;
  return {(NativeFloat)((NativeInt)absolute(magnitude).v | sign_bit)};
}
DROPE_INLINE Vec nearest(Vec x) {  // adding 2^23 leaves no room for a fraction
  const Vec shift = copy_sign(broadcast(8388608.0f), x);
  return select(less(absolute(x), broadcast(8388608.0f)), (x + shift) - shift, x);
}
// floor(x), not below -127, which as an exponent makes 0.
DROPE_INLINE Vec bounded_floor(Vec x) {
  x = max(broadcast(-127.0f), x);
  const Vec whole = nearest(x);
  return select(less(x, whole), whole - broadcast(1.0f), whole);
}
// x - floor(x); 0 at -infinity.
DROPE_INLINE Vec fraction(Vec x) { return max(broadcast(-127.0f), x) - bounded_floor(x); }
// p * 2^floor(x) for x < 128; exactly 0 at -infinity.
DROPE_INLINE Vec times_two_to_floor(Vec p, Vec x) {
  const NativeInt exponent = __builtin_convertvector(bounded_floor(x).v, NativeInt) + 127;
  return {p.v * (NativeFloat)(exponent << 23)};
}
DROPE_INLINE float sum_lanes(Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
DROPE_INLINE float max_lanes(Vec x) {
  return std::fmax(std::fmax(x.v[0], x.v[2]), std::fmax(x.v[1], x.v[3]));
}

// (a0 a1 a2 a3) (b0 b1 b2 b3) -> even (a0 a2 b0 b2), odd (a1 a3 b1 b3), and back.
DROPE_INLINE void deinterleave(Vec& a, Vec& b) {
  const NativeFloat even = {a.v[0], a.v[2], b.v[0], b.v[2]};
  b.v = NativeFloat{a.v[1], a.v[3], b.v[1], b.v[3]};
  a.v = even;
}
DROPE_INLINE void interleave(Vec& a, Vec& b) {
  const NativeFloat low = {a.v[0], b.v[0], a.v[1], b.v[1]};
  b.v = NativeFloat{a.v[2], b.v[2], a.v[3], b.v[3]};
  a.v = low;
}

// Element i of row j becomes element j of row i.
DROPE_INLINE void transpose(Vec (&row)[kLanes]) {
  const NativeFloat a = row[0].v, b = row[1].v, c = row[2].v, d = row[3].v;
  for (int i = 0; i < kLanes; ++i) row[i].v = NativeFloat{a[i], b[i], c[i], d[i]};
}

// Lane i of the result is sum_lanes(x[i]).
DROPE_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  Vec row[kLanes] = {x[0], x[1], x[2], x[3]};
  transpose(row);
  return (row[0] + row[2]) + (row[1] + row[3]);
}

// Lanes [kRows * i, kRows * (i + 1)) go to p + i * stride: here there is one part.
DROPE_INLINE void store_split(float* p, int64_t, Vec x) { store(p, x); }

// Access to any element type that widens to float one number at a time.
template <class Number>
struct Element {
  using Storage = typename Number::Storage;
  static DROPE_INLINE Vec load(const Storage* p, int count) {
    Vec x = zero();
    for (int i = 0; i < count; ++i) x.v[i] = Number::widen(p[i]);
    return x;
  }
  static DROPE_INLINE void store(Storage* p, Vec x, int count) {
    for (int i = 0; i < count; ++i) p[i] = Number::narrow(x.v[i]);
  }
  static DROPE_INLINE Vec round(Vec x) {
    for (int i = 0; i < kLanes; ++i) x.v[i] = Number::widen(Number::narrow(x.v[i]));
    return x;
  }
  static DROPE_INLINE Vec load(const Storage* p) { return load(p, kLanes); }
  static DROPE_INLINE void store(Storage* p, Vec x) { store(p, x, kLanes); }
};

DROPE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
DROPE_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Float32Number {
  using Storage = float;
  static DROPE_INLINE float widen(float x) { return x; }
  static DROPE_INLINE float narrow(float x) { return x; }
};

struct Float16Number {
  using Storage = uint16_t;
  static DROPE_INLINE float widen(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponent bias differs by 112; the product also normalises subnormals.
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
  }
  static DROPE_INLINE uint16_t narrow(float x) {  // to nearest even
    const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
    const float magnitude = std::fabs(x);
    uint32_t half;
    if (!(magnitude < 65520.0f)) {  // overflow, infinity or NaN
      half = magnitude >= 65520.0f ? 0x7c00u : 0x7e00u;
    } else if (magnitude < 0x1p-14f) {  // adding 0.5 leaves the subnormal's 10 bits at the bottom
      half = bits_of(magnitude + 0.5f) - bits_of(0.5f);
    } else {
      const uint32_t bits = bits_of(magnitude);
      half = (bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
  }
};

struct BFloat16Number {
  using Storage = uint16_t;
  static DROPE_INLINE float widen(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
  static DROPE_INLINE uint16_t narrow(float x) {  // to nearest even; NaN stays NaN
    if (x != x) return 0x7fc0;
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

using Float32 = Element<Float32Number>;
using Float16 = Element<Float16Number>;
using BFloat16 = Element<BFloat16Number>;

}  // namespace drope::DROPE_ISA
