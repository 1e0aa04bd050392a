// What one 32-bit word of a packed operand holds, and how two vectors of words multiply.
#pragma once

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

// A word is one float32 number.
struct DotFloat32 {
  using Operand = Float32;          // the element type that words are made of
  static constexpr int kDepth = 1;  // elements per word, consecutive along the contraction
  static DROPE_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

  // Rows k and k + 1 of a lane operand, `ldb` floats apart; returns where row k + 2 goes.
  static DROPE_INLINE float* store_rows(float* words, int64_t ldb, Vec row0, Vec row1) {
    store(words, row0);
    store(words + ldb, row1);
    return words + 2 * ldb;
  }

  // Elements [i, i + kLanes) of a row whose words run along the contraction.
  static DROPE_INLINE void store_elements(float* words, int64_t i, Vec x) { store(words + i, x); }

  // Words along a row that lies anywhere: `count` elements, at most kLanes * kDepth; the rest is 0.
  template <class Element>
  static DROPE_INLINE Vec load_along(const typename Element::Storage* row, int count) {
    return count == kLanes ? Element::load(row) : Element::load(row, count);
  }

  // Words across kDepth rows, of `count` channels from `channel` on, at most kLanes * kDepth; the
  // rest is 0. Sums of their products are put in the order of channels by `in_order`.
  template <class Element>
  static DROPE_INLINE void load_across(const typename Element::Storage* const* rows,
                                       int64_t channel, int count, Vec* words) {
    words[0] = load_along<Element>(rows[0] + channel, count);
  }
  static DROPE_INLINE void in_order(Vec*) {}
};

#ifdef __AVX512BF16__

// A word is two consecutive bf16 numbers; products and sums stay in float32.
struct DotBFloat16 {
  using Operand = BFloat16;
  static constexpr int kDepth = 2;

  static DROPE_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }

  // Lane i of the result is the word (first[i], second[i]).
  static DROPE_INLINE Vec pair(Vec first, Vec second) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512bh both = _mm512_cvtne2ps_pbh(second.v, first.v);
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)both))};
  }

  // Rows k and k + 1 of a lane operand are one row of words; returns where row k + 2 goes.
  static DROPE_INLINE float* store_rows(float* words, int64_t ldb, Vec row0, Vec row1) {
    store(words, pair(row0, row1));
    return words + ldb;
  }

  // Elements [i, i + kLanes) of a row whose words run along the contraction.
  static DROPE_INLINE void store_elements(float* words, int64_t i, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i / 2),
                        (__m256i)_mm512_cvtneps_pbh(x.v));
  }

  // words[i] = (first[i], second[i]) for i < kRows.
  static DROPE_INLINE void interleave_rows(const uint16_t* first, const uint16_t* second,
                                           float* words) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
    _mm_storeu_ps(words, _mm_castsi128_ps(_mm_unpacklo_epi16(a, b)));
    _mm_storeu_ps(words + 4, _mm_castsi128_ps(_mm_unpackhi_epi16(a, b)));
  }

  static DROPE_INLINE __m512i load_bits(const uint16_t* p, int count) {
    if (count == 2 * kLanes) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
  }

  // Words along a row that lies anywhere: `count` elements, at most kLanes * kDepth; the rest is 0.
  template <class Element>
  static DROPE_INLINE Vec load_along(const uint16_t* row, int count) {
    return {_mm512_castsi512_ps(load_bits(row, count))};
  }

  // Words across kDepth rows, of `count` channels from `channel` on, at most kLanes * kDepth; the
  // rest is 0. Sums of their products are put in the order of channels by `in_order`.
  template <class Element>
  static DROPE_INLINE void load_across(const uint16_t* const* rows, int64_t channel, int count,
                                       Vec* words) {
    const __m512i a = load_bits(rows[0] + channel, count), b = load_bits(rows[1] + channel, count);
    words[0].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
    words[1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
  }
  // Of every eight channels, load_across has the first four in one vector, the others in the next.
  static DROPE_INLINE void in_order(Vec* x) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 first = _mm512_permutex2var_ps(x[0].v, low, x[1].v);
    x[1].v = _mm512_permutex2var_ps(x[0].v, high, x[1].v);
    x[0].v = first;
  }
};

using DotForBFloat16 = DotBFloat16;

#else

using DotForBFloat16 = DotFloat32;

#endif

}  // namespace drope::DROPE_ISA
