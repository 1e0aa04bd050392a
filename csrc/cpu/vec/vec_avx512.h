// AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

inline constexpr int kLanes = 16;
inline constexpr int kRows = 8;     // micro-kernel: kRows x kMaxVecs accumulators,
inline constexpr int kMaxVecs = 3;  // 24 + 3 operand vectors + 1 broadcast of 32 registers

struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 m;
};

DROPE_INLINE __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

DROPE_INLINE Vec splat(Vec, float x) { return {_mm512_set1_ps(x)}; }
DROPE_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
DROPE_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
DROPE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
DROPE_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }

DROPE_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
DROPE_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
DROPE_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
DROPE_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
DROPE_INLINE Vec fused(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
DROPE_INLINE Vec fma(Vec a, Vec b, Vec c) { return fused(a, b, c); }
// max(a, NaN) is NaN: the second operand wins.
DROPE_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
DROPE_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
DROPE_INLINE Vec nearest(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
DROPE_INLINE Vec absolute(Vec x) { return {_mm512_abs_ps(x.v)}; }
DROPE_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return {_mm512_or_ps(_mm512_abs_ps(magnitude.v), _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
// x - floor(x); 0 at -infinity.
DROPE_INLINE Vec fraction(Vec x) {
  return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
// p * 2^floor(x) for x < 128; exactly 0 at -infinity.
DROPE_INLINE Vec times_two_to_floor(Vec p, Vec x) { return {_mm512_scalef_ps(p.v, x.v)}; }

DROPE_INLINE Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
DROPE_INLINE Mask less_equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
DROPE_INLINE Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
DROPE_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
DROPE_INLINE bool any(Mask m) { return m.m != 0; }
DROPE_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(m.m, no.v, yes.v)};
}
DROPE_INLINE float sum_lanes(Vec x) { return _mm512_reduce_add_ps(x.v); }
DROPE_INLINE float max_lanes(Vec x) { return _mm512_reduce_max_ps(x.v); }

// Lane i of the result is sum_lanes(x[i]).
DROPE_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  __m512 quads[4];  // quads[i], 128-bit part p: part p of rows 4 i .. 4 i + 3, each summed
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = x[4 * i].v, b = x[4 * i + 1].v, c = x[4 * i + 2].v, d = x[4 * i + 3].v;
    const __m512d ab =
        _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd =
        _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  // Sums of even and odd 128-bit parts, first those of one operand, then those of the other.
  const auto sum_parts = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {sum_parts(sum_parts(quads[0], quads[1]), sum_parts(quads[2], quads[3]))};
}

// (a0 a1 .. a15) (b0 .. b15) -> even (a0 a2 .. b14), odd (a1 a3 .. b15), and back.
DROPE_INLINE void deinterleave(Vec& a, Vec& b) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 evens = _mm512_permutex2var_ps(a.v, even, b.v);
  b.v = _mm512_permutex2var_ps(a.v, odd, b.v);
  a.v = evens;
}
DROPE_INLINE void interleave(Vec& a, Vec& b) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 first = _mm512_permutex2var_ps(a.v, low, b.v);
  b.v = _mm512_permutex2var_ps(a.v, high, b.v);
  a.v = first;
}

// Element i of row j becomes element j of row i.
DROPE_INLINE void transpose(Vec (&row)[kLanes]) {
  __m512 pairs[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(row[i].v, row[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(row[i].v, row[i + 1].v);
  }
  __m512 quads[16];  // quads[4 i + j], 128-bit part p: rows 4 i .. 4 i + 3 of column 4 p + j
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(pairs[i]), b = _mm512_castps_pd(pairs[i + 1]);
    const __m512d c = _mm512_castps_pd(pairs[i + 2]), d = _mm512_castps_pd(pairs[i + 3]);
    quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);  // columns j and j + 8
    const __m512 b = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);  // j + 4 and j + 12
    const __m512 c = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
    row[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    row[j + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    row[j + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
    row[j + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// Lanes [kRows * i, kRows * (i + 1)) go to p + i * stride.
DROPE_INLINE void store_split(float* p, int64_t stride, Vec x) {
  _mm256_storeu_ps(p, _mm512_castps512_ps256(x.v));
  _mm256_storeu_ps(p + stride, _mm512_extractf32x8_ps(x.v, 1));
}

struct Float32 {
  using Storage = float;
  static DROPE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static DROPE_INLINE Vec load(const float* p, int count) {
    return {_mm512_maskz_loadu_ps(first_lanes(count), p)};
  }
  static DROPE_INLINE Vec round(Vec x) { return x; }
  static DROPE_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
  static DROPE_INLINE void store(float* p, Vec x, int count) {
    _mm512_mask_storeu_ps(p, first_lanes(count), x.v);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static DROPE_INLINE Vec widen(__m256i x) { return {_mm512_cvtph_ps(x)}; }
  static DROPE_INLINE __m256i narrow(Vec x) {
    return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static DROPE_INLINE Vec round(Vec x) { return widen(narrow(x)); }
  static DROPE_INLINE Vec load(const uint16_t* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static DROPE_INLINE Vec load(const uint16_t* p, int count) {
    return widen(_mm256_maskz_loadu_epi16(first_lanes(count), p));
  }
  static DROPE_INLINE void store(uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x));
  }
  static DROPE_INLINE void store(uint16_t* p, Vec x, int count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(x));
  }
};

// To nearest even; NaN stays NaN.
#ifdef __AVX512BF16__
DROPE_INLINE __m256i to_bfloat16(__m512 x) {  // subnormal numbers become 0
  return (__m256i)_mm512_cvtneps_pbh(x);
}
#else
DROPE_INLINE __m256i to_bfloat16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, high, _mm512_set1_epi32(0x7fc0)));
}
#endif

struct BFloat16 {
  using Storage = uint16_t;
  static DROPE_INLINE Vec widen(__m256i x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
  static DROPE_INLINE __m256i narrow(Vec x) { return to_bfloat16(x.v); }
  static DROPE_INLINE Vec round(Vec x) { return widen(narrow(x)); }
  static DROPE_INLINE Vec load(const uint16_t* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static DROPE_INLINE Vec load(const uint16_t* p, int count) {
    return widen(_mm256_maskz_loadu_epi16(first_lanes(count), p));
  }
  static DROPE_INLINE void store(uint16_t* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x));
  }
  static DROPE_INLINE void store(uint16_t* p, Vec x, int count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(x));
  }
};

}  // namespace drope::DROPE_ISA
