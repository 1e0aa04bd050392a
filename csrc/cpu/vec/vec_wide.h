// 16 lanes on any machine, as loops that a compiler turns into what vectors it has: for the tile
// kernels where registers are narrower. Every operation rounds as AVX-512's does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

inline constexpr int kLanes = 16;

struct Vec {
  alignas(64) float v[kLanes];
};
struct Mask {
  alignas(64) uint32_t m[kLanes];  // all bits of a lane, or none
};

template <class Function>
DROPE_INLINE Vec each_lane(const Function& function) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x.v[i] = function(i);
  return x;
}
template <class Function>
DROPE_INLINE Mask each_test(const Function& function) {
  Mask mask;
  for (int i = 0; i < kLanes; ++i) mask.m[i] = function(i) ? ~0u : 0u;
  return mask;
}

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

DROPE_INLINE Vec broadcast(float x) {
  return each_lane([&](int) { return x; });
}
DROPE_INLINE Vec splat(Vec, float x) { return broadcast(x); }
DROPE_INLINE Vec zero() { return broadcast(0.0f); }
DROPE_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
DROPE_INLINE void store(float* p, const Vec& x) { std::memcpy(p, x.v, sizeof x.v); }

DROPE_INLINE Vec operator+(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
DROPE_INLINE Vec operator-(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
DROPE_INLINE Vec operator*(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.v[i] * b.v[i]; });
}
DROPE_INLINE Vec operator/(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.v[i] / b.v[i]; });
}
DROPE_INLINE Vec fused(const Vec& a, const Vec& b, const Vec& c) {
  return each_lane([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
DROPE_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) { return fused(a, b, c); }

DROPE_INLINE Mask less(const Vec& a, const Vec& b) {
  return each_test([&](int i) { return a.v[i] < b.v[i]; });
}
DROPE_INLINE Mask less_equal(const Vec& a, const Vec& b) {
  return each_test([&](int i) { return a.v[i] <= b.v[i]; });
}
DROPE_INLINE Mask equal(const Vec& a, const Vec& b) {
  return each_test([&](int i) { return a.v[i] == b.v[i]; });
}
DROPE_INLINE Mask operator&(const Mask& a, const Mask& b) {
  return each_test([&](int i) { return (a.m[i] & b.m[i]) != 0; });
}
DROPE_INLINE bool any(const Mask& mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask.m[i];
  return bits != 0;
}
DROPE_INLINE Vec select(const Mask& mask, const Vec& yes, const Vec& no) {
  return each_lane([&](int i) { return mask.m[i] != 0 ? yes.v[i] : no.v[i]; });
}
// max(a, NaN) is NaN: the second operand wins.
DROPE_INLINE Vec max(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
DROPE_INLINE Vec min(const Vec& a, const Vec& b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
DROPE_INLINE Vec absolute(const Vec& x) {
  return each_lane([&](int i) { return std::fabs(x.v[i]); });
}
DROPE_INLINE Vec copy_sign(const Vec& magnitude, const Vec& sign) {
  return each_lane([&](int i) { return std::copysign(magnitude.v[i], sign.v[i]); });
}
DROPE_INLINE Vec nearest(const Vec& x) {
  return each_lane([&](int i) { return std::nearbyint(x.v[i]); });
}
// x - floor(x) rounded down, as AVX-512 does; 0 at -infinity.
DROPE_INLINE Vec fraction(const Vec& x) {
  return each_lane([&](int i) {
    const float whole = std::floor(x.v[i]), rest = x.v[i] - whole;
    const bool rounded_up = x.v[i] < rest + whole;
    return std::fabs(x.v[i]) == HUGE_VALF ? 0.0f : float_of(bits_of(rest) - (rounded_up ? 1u : 0u));
  });
}
// p * 2^floor(x) for x < 128; exactly 0 at -infinity.
DROPE_INLINE Vec times_two_to_floor(const Vec& p, const Vec& x) {
  return each_lane([&](int i) {
    const float whole = std::floor(std::fmin(std::fmax(x.v[i], -252.0f), 252.0f));
    // In two steps, neither of which leaves the normal numbers; NaN was bounded, so it is put back.
    const int exponent = static_cast<int>(whole), half = exponent / 2;
    const float low = float_of(static_cast<uint32_t>(half + 127) << 23);
    const float high = float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
    return x.v[i] == x.v[i] ? p.v[i] * low * high : x.v[i];
  });
}

// Of bits, lane by lane.
template <class Function>
DROPE_INLINE Vec each_bits(const Function& function) {
  return each_lane([&](int i) { return float_of(function(i)); });
}

// (a0 a1 .. a15) (b0 .. b15) -> even (a0 a2 .. b14), odd (a1 a3 .. b15), and back.
DROPE_INLINE void deinterleave(Vec& a, Vec& b) {
  float both[2 * kLanes];
  store(both, a);
  store(both + kLanes, b);
  a = each_lane([&](int i) { return both[2 * i]; });
  b = each_lane([&](int i) { return both[2 * i + 1]; });
}
DROPE_INLINE void interleave(Vec& a, Vec& b) {
  float both[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    both[2 * i] = a.v[i];
    both[2 * i + 1] = b.v[i];
  }
  a = load(both);
  b = load(both + kLanes);
}

// Element i of row j becomes element j of row i.
DROPE_INLINE void transpose(Vec (&row)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = row[i].v[j];
      row[i].v[j] = row[j].v[i];
      row[j].v[i] = x;
    }
  }
}

struct Float32 {
  using Storage = float;
  static DROPE_INLINE Vec load(const float* p, int count = kLanes) {
    return each_lane([&](int i) { return i < count ? p[i] : 0.0f; });
  }
  static DROPE_INLINE Vec round(const Vec& x) { return x; }
  static DROPE_INLINE void store(float* p, const Vec& x, int count = kLanes) {
    std::memcpy(p, x.v, sizeof(float) * static_cast<uint64_t>(count));
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  // To nearest even; NaN stays NaN, subnormal numbers become 0.
  static DROPE_INLINE uint16_t narrow(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    if (magnitude < 0x00800000u) return static_cast<uint16_t>(bits >> 31 << 15);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  static DROPE_INLINE Vec load(const uint16_t* p, int count = kLanes) {
    return each_lane(
        [&](int i) { return float_of(i < count ? static_cast<uint32_t>(p[i]) << 16 : 0u); });
  }
  static DROPE_INLINE Vec round(const Vec& x) {
    return each_lane([&](int i) { return float_of(static_cast<uint32_t>(narrow(x.v[i])) << 16); });
  }
  static DROPE_INLINE void store(uint16_t* p, const Vec& x, int count = kLanes) {
    for (int i = 0; i < count; ++i) p[i] = narrow(x.v[i]);
  }
};

}  // namespace drope::DROPE_ISA
