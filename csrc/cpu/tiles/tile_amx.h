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

}  // namespace drope::DROPE_ISA
