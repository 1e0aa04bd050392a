// The eight tile registers of AMX: 16 rows of 16 words, a word one float32 or two bf16 numbers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

// Held by a task while it works on tiles: configures the registers, which are all 0 then, and
// makes subnormal numbers 0 as tile products do. Both end with it: live tiles would add 8 KiB to
// every switch of the thread, and other libraries configure their own.
//
// Written in assembly: GCC 12's intrinsics name no memory, so stores before them may move.
class Tiles {
 public:
  DROPE_INLINE Tiles() : control_(_mm_getcsr()) {
    Configuration configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
    _mm_setcsr(control_ | kFlushToZero | kSubnormalsAreZero);
  }
  DROPE_INLINE ~Tiles() {
    asm volatile("tilerelease" ::: "memory");
    _mm_setcsr(control_);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // Registers are template arguments. In memory a tile is 16 rows of 16 words, without gaps.
  template <int kTile>
  DROPE_INLINE void load(const float* from) const {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(kRowBytes), "i"(kTile)
                 : "memory");
  }
  // Past the L1 cache: for operands that are as good as read once.
  template <int kTile>
  DROPE_INLINE void load_streaming(const float* from) const {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(kRowBytes), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  DROPE_INLINE void store(float* to) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(kRowBytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  DROPE_INLINE void zero() const {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // sum(m, n) += a(m, word) . b(word, n), words of two bf16 numbers, sums in float32.
  template <int kSum, int kA, int kB>
  DROPE_INLINE void multiply_add() const {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }

 private:
  static constexpr int64_t kRowBytes = 64;
  static constexpr unsigned kFlushToZero = 0x8000, kSubnormalsAreZero = 0x0040;

  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  unsigned control_;
};

// Lane i is the word (low[i], high[i]), both rounded to bf16, ties away from 0: two instructions
// less than ties to even, and where AMX runs beside them the fewest that it slows down.
DROPE_INLINE Vec to_words(Vec low, Vec high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i first = _mm512_add_epi32(_mm512_castps_si512(low.v), half);
  const __m512i second = _mm512_add_epi32(_mm512_castps_si512(high.v), half);
  return {_mm512_castsi512_ps(
      _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second))};
}

// Words of 16 numbers of one row and those of another.
DROPE_INLINE Vec pair_words(const uint16_t* low, const uint16_t* high) {
  const auto widen = [](const uint16_t* numbers) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
  };
  return {_mm512_castsi512_ps(_mm512_or_si512(widen(low), _mm512_slli_epi32(widen(high), 16)))};
}

// 16 bytes from each of rows i, i + 4, i + 8, i + 12, `offset` numbers in. Transposes that begin so
// need half the shuffles of those that begin with whole rows: only one port shuffles.
DROPE_INLINE __m512i load_quarters(const uint16_t* const* rows, int64_t i, int64_t offset) {
  const auto quarter = [&](int64_t row) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset));
  };
  __m512i x = _mm512_castsi128_si512(quarter(i));
  x = _mm512_inserti32x4(x, quarter(i + 4), 1);
  x = _mm512_inserti32x4(x, quarter(i + 8), 2);
  return _mm512_inserti32x4(x, quarter(i + 12), 3);
}

// Columns of four rows of words, 128 bits by 128 bits.
DROPE_INLINE void transpose_quarters(__m512i (&x)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi32(x[0], x[1]),
                low23 = _mm512_unpacklo_epi32(x[2], x[3]);
  const __m512i high01 = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i high23 = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(low01, low23);
  x[1] = _mm512_unpackhi_epi64(low01, low23);
  x[2] = _mm512_unpacklo_epi64(high01, high23);
  x[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Word w of row i to (w, i), w < 16.
DROPE_INLINE void transpose_words(const uint16_t* const* rows, float* tile) {
  for (int64_t w = 0; w < 16; w += 4) {
    __m512i x[4];
    for (int64_t i = 0; i < 4; ++i) x[i] = load_quarters(rows, i, 2 * w);
    transpose_quarters(x);
    for (int64_t i = 0; i < 4; ++i) _mm512_storeu_si512(tile + (w + i) * 16, x[i]);
  }
}

// Numbers c of rows low[i] and high[i], a word, to (c, i), c < 16.
DROPE_INLINE void transpose_pairs(const uint16_t* const* low, const uint16_t* const* high,
                                  float* tile) {
  for (int64_t c = 0; c < 16; c += 8) {
    __m512i first[4], second[4];  // of each eight numbers the first four, the others
    for (int64_t i = 0; i < 4; ++i) {
      const __m512i a = load_quarters(low, i, c), b = load_quarters(high, i, c);
      first[i] = _mm512_unpacklo_epi16(a, b);
      second[i] = _mm512_unpackhi_epi16(a, b);
    }
    transpose_quarters(first);
    transpose_quarters(second);
    for (int64_t i = 0; i < 4; ++i) {
      _mm512_storeu_si512(tile + (c + i) * 16, first[i]);
      _mm512_storeu_si512(tile + (c + 4 + i) * 16, second[i]);
    }
  }
}

}  // namespace drope::DROPE_ISA
