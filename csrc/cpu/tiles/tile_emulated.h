// What tile_amx.h does, in software: for machines without AMX, to the last bit.
#pragma once

#ifdef __SSE__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

class Tiles {
 public:
#ifdef __SSE__
  Tiles() : control_(_mm_getcsr()) { _mm_setcsr(control_ | kFlushToZero | kSubnormalsAreZero); }
  ~Tiles() { _mm_setcsr(control_); }
#else
  Tiles() : control_(0) {}
#endif
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void load(const float* from) const {
    std::memcpy(&tiles_[kTile], from, sizeof tiles_[kTile]);
  }
  template <int kTile>
  void load_streaming(const float* from) const {
    load<kTile>(from);
  }
  template <int kTile>
  void store(float* to) const {
    std::memcpy(to, &tiles_[kTile], sizeof tiles_[kTile]);
  }
  template <int kTile>
  void zero() const {
    std::memset(&tiles_[kTile], 0, sizeof tiles_[kTile]);
  }
  template <int kSum, int kA, int kB>
  void multiply_add() const {
    multiply_add(tiles_[kSum], tiles_[kA], tiles_[kB]);
  }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kSubnormalsAreZero = 0x0040;
  static constexpr int kRowCount = 16;

  struct alignas(64) Tile {
    float rows[kRowCount][kLanes];
  };

  // The products of the first numbers of the words are one chain of multiply-adds from 0, those of
  // the second another; both chains are added, then their sum to what was there. Found on an
  // Emerald Rapids by comparing bits; subnormal numbers are 0 on the way in and out.
  static void multiply_add(Tile& sum, const Tile& a, const Tile& b) {
    Tile low, high;
    for (int word = 0; word < kRowCount; ++word) {
      store_vec(low.rows[word], each_bits([&](int n) { return bits_of(b.rows[word][n]) << 16; }));
      store_vec(high.rows[word],
                each_bits([&](int n) { return bits_of(b.rows[word][n]) & 0xffff0000u; }));
    }
    for (int m = 0; m < kRowCount; ++m) {
      Vec first = broadcast(0.0f), second = broadcast(0.0f);
      for (int word = 0; word < kRowCount; ++word) {
        const uint32_t bits = bits_of(a.rows[m][word]);
        first = fused(broadcast(float_of(bits << 16)), load_vec(low.rows[word]), first);
        second = fused(broadcast(float_of(bits & 0xffff0000u)), load_vec(high.rows[word]), second);
      }
      store_vec(sum.rows[m], load_vec(sum.rows[m]) + (first + second));
    }
  }

  // The vector's own, which the members above hide.
  static Vec load_vec(const float* from) { return drope::DROPE_ISA::load(from); }
  static void store_vec(float* to, const Vec& x) { drope::DROPE_ISA::store(to, x); }

  mutable Tile tiles_[8];
  unsigned control_;
};

DROPE_INLINE Vec to_words(const Vec& low, const Vec& high) {
  return each_bits([&](int i) {
    return (bits_of(low.v[i]) + 0x8000u) >> 16 | ((bits_of(high.v[i]) + 0x8000u) & 0xffff0000u);
  });
}

DROPE_INLINE Vec pair_words(const uint16_t* low, const uint16_t* high) {
  return each_bits([&](int i) { return low[i] | static_cast<uint32_t>(high[i]) << 16; });
}

DROPE_INLINE void transpose_words(const uint16_t* const* rows, float* tile) {
  for (int w = 0; w < kLanes; ++w) {
    for (int i = 0; i < kLanes; ++i) std::memcpy(tile + w * kLanes + i, rows[i] + 2 * w, 4);
  }
}

DROPE_INLINE void transpose_pairs(const uint16_t* const* low, const uint16_t* const* high,
                                  float* tile) {
  for (int c = 0; c < kLanes; ++c) {
    store(tile + c * kLanes,
          each_bits([&](int i) { return low[i][c] | static_cast<uint32_t>(high[i][c]) << 16; }));
  }
}

}  // namespace drope::DROPE_ISA
