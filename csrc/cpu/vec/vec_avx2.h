// AVX2 with FMA and F16C: 8 lanes, 16 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

inline constexpr int kLanes = 8;
inline constexpr int kRows = 4;     // micro-kernel: kRows x kMaxVecs accumulators,
inline constexpr int kMaxVecs = 3;  // 12 + 3 operand vectors + 1 broadcast of 16 registers

struct Vec {
  __m256 v;
};
struct Mask {
  __m256 m;
};

DROPE_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

DROPE_INLINE Vec splat(Vec, float x) { return {_mm256_set1_ps(x)}; }
DROPE_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
DROPE_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
DROPE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
DROPE_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }

DROPE_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
DROPE_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
DROPE_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
DROPE_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
DROPE_INLINE Vec fused(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
DROPE_INLINE Vec fma(Vec a, Vec b, Vec c) { return fused(a, b, c); }
// max(a, NaN) is NaN: the second operand wins.
DROPE_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
DROPE_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
DROPE_INLINE Vec nearest(Vec x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
DROPE_INLINE Vec absolute(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
DROPE_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return {_mm256_or_ps(absolute(magnitude).v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
// floor(x), not below -127, which as an exponent makes 0.
DROPE_INLINE __m256 bounded_floor(Vec x) {
  return _mm256_floor_ps(_mm256_max_ps(_mm256_set1_ps(-127.0f), x.v));
}
// x - floor(x); 0 at -infinity.
DROPE_INLINE Vec fraction(Vec x) {
  return {_mm256_sub_ps(_mm256_max_ps(_mm256_set1_ps(-127.0f), x.v), bounded_floor(x))};
}
// p * 2^floor(x) for x < 128; exactly 0 at -infinity.
DROPE_INLINE Vec times_two_to_floor(Vec p, Vec x) {
  const __m256i exponent = _mm256_cvtps_epi32(bounded_floor(x));
  const __m256i biased = _mm256_add_epi32(exponent, _mm256_set1_epi32(127));
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)))};
}

DROPE_INLINE Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
DROPE_INLINE Mask less_equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
DROPE_INLINE Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
DROPE_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
DROPE_INLINE Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
DROPE_INLINE float sum_lanes(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
DROPE_INLINE float max_lanes(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// Lane i of the result is sum_lanes(x[i]).
DROPE_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  __m256 quads[2];  // quads[i], 128-bit part p: part p of rows 4 i .. 4 i + 3, each summed
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256 ab = _mm256_hadd_ps(x[4 * i].v, x[4 * i + 1].v);
    const __m256 cd = _mm256_hadd_ps(x[4 * i + 2].v, x[4 * i + 3].v);
    quads[i] = _mm256_hadd_ps(ab, cd);
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                        _mm256_permute2f128_ps(quads[0], quads[1], 0x31))};
}

// (a0 a1 .. a7) (b0 .. b7) -> even (a0 a2 .. b6), odd (a1 a3 .. b7), and back.
DROPE_INLINE void deinterleave(Vec& a, Vec& b) {
  const __m256 low = _mm256_permute2f128_ps(a.v, b.v, 0x20);   // a0..a3 b0..b3
  const __m256 high = _mm256_permute2f128_ps(a.v, b.v, 0x31);  // a4..a7 b4..b7
  // shuffle_ps works within 128-bit halves: a0 a2 a4 a6, b0 b2 b4 b6
  a.v = _mm256_shuffle_ps(low, high, 0x88);
  b.v = _mm256_shuffle_ps(low, high, 0xdd);
}
DROPE_INLINE void interleave(Vec& a, Vec& b) {
  const __m256 low = _mm256_unpacklo_ps(a.v, b.v);   // a0 b0 a1 b1, a4 b4 a5 b5
  const __m256 high = _mm256_unpackhi_ps(a.v, b.v);  // a2 b2 a3 b3, a6 b6 a7 b7
  a.v = _mm256_permute2f128_ps(low, high, 0x20);
  b.v = _mm256_permute2f128_ps(low, high, 0x31);
}

// Element i of row j becomes element j of row i.
DROPE_INLINE void transpose(Vec (&row)[kLanes]) {
  __m256 quads[8];  // quads[4 i + j], 128-bit part p: rows 4 i .. 4 i + 3 of column 4 p + j
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(row[i].v, row[i + 1].v);
    const __m256 b = _mm256_unpackhi_ps(row[i].v, row[i + 1].v);
    const __m256 c = _mm256_unpacklo_ps(row[i + 2].v, row[i + 3].v);
    const __m256 d = _mm256_unpackhi_ps(row[i + 2].v, row[i + 3].v);
    quads[i] = _mm256_shuffle_ps(a, c, 0x44);
    quads[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    quads[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    quads[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    row[j].v = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20);
    row[j + 4].v = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31);
  }
}

// Lanes [kRows * i, kRows * (i + 1)) go to p + i * stride.
DROPE_INLINE void store_split(float* p, int64_t stride, Vec x) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(x.v));
  _mm_storeu_ps(p + stride, _mm256_extractf128_ps(x.v, 1));
}

struct Float32 {
  using Storage = float;
  static DROPE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static DROPE_INLINE Vec load(const float* p, int count) {
    return {_mm256_maskload_ps(p, first_lanes(count))};
  }
  static DROPE_INLINE Vec round(Vec x) { return x; }
  static DROPE_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
  static DROPE_INLINE void store(float* p, Vec x, int count) {
    _mm256_maskstore_ps(p, first_lanes(count), x.v);
  }
};

// AVX2 has no masked 16-bit access: partial vectors go through a small array.
DROPE_INLINE __m128i load_words(const uint16_t* p, int count) {
  uint16_t words[8] = {};
  std::memcpy(words, p, sizeof(uint16_t) * static_cast<unsigned>(count));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
}
DROPE_INLINE void store_words(uint16_t* p, __m128i x, int count) {
  uint16_t words[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), x);
  std::memcpy(p, words, sizeof(uint16_t) * static_cast<unsigned>(count));
}

struct Float16 {
  using Storage = uint16_t;
  static DROPE_INLINE Vec widen(__m128i x) { return {_mm256_cvtph_ps(x)}; }
  static DROPE_INLINE __m128i narrow(Vec x) {
    return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static DROPE_INLINE Vec round(Vec x) { return widen(narrow(x)); }
  static DROPE_INLINE Vec load(const uint16_t* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static DROPE_INLINE Vec load(const uint16_t* p, int count) { return widen(load_words(p, count)); }
  static DROPE_INLINE void store(uint16_t* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x));
  }
  static DROPE_INLINE void store(uint16_t* p, Vec x, int count) {
    store_words(p, narrow(x), count);
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static DROPE_INLINE Vec widen(__m128i x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
  }
  static DROPE_INLINE __m128i narrow(Vec x) {  // to nearest even; NaN stays NaN
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static DROPE_INLINE Vec round(Vec x) { return widen(narrow(x)); }
  static DROPE_INLINE Vec load(const uint16_t* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static DROPE_INLINE Vec load(const uint16_t* p, int count) { return widen(load_words(p, count)); }
  static DROPE_INLINE void store(uint16_t* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x));
  }
  static DROPE_INLINE void store(uint16_t* p, Vec x, int count) {
    store_words(p, narrow(x), count);
  }
};

}  // namespace drope::DROPE_ISA
