// What one 32-bit word of a packed operand holds, and how two vectors of words multiply.
#pragma once

#include "cpu/inline.h"

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
};

using DotForBFloat16 = DotBFloat16;

#else

using DotForBFloat16 = DotFloat32;

#endif

}  // namespace drope::DROPE_ISA
