// How fast this CPU multiplies tiles when nothing else happens: what kernels are measured against.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/thread_seconds.h"
#include "cpu/tiles/pack.h"
#include "cpu/tiles/unroll.h"

namespace drope::DROPE_ISA {

// Random numbers: on zeros the clock of an Emerald Rapids stays a quarter higher than on data.
inline double tile_peak(double seconds) {
  constexpr int64_t kRepeats = 2000;
  constexpr double kFlops = 2.0 * kRepeats * 4 * kTileRows * kLanes * kStep;
  alignas(64) float words[4 * kTile];
  uint32_t state = 1;
  for (float& word : words) {
    uint32_t bits = 0;
    for (int half = 0; half < 2; ++half) {
      state = state * 1664525u + 1013904223u;
      bits = bits << 16 | (0x3f00u + (state >> 25)) | (state >> 31 << 15);  // 0.5 to 1, any sign
    }
    std::memcpy(&word, &bits, sizeof word);
  }
  const Tiles tiles;
  const double begin = thread_seconds();
  double elapsed = 0.0, flops = 0.0;
  while (elapsed < seconds || flops == 0.0) {
    unroll<4>([&](auto i) DROPE_INLINE_LAMBDA {
      tiles.template load<4 + i>(words + i * kTile);
      tiles.template zero<i>();
    });
    for (int64_t i = 0; i < kRepeats; ++i) {
      tiles.multiply_add<0, 4, 6>();
      tiles.multiply_add<1, 4, 7>();
      tiles.multiply_add<2, 5, 6>();
      tiles.multiply_add<3, 5, 7>();
    }
    flops += kFlops;
    elapsed = thread_seconds() - begin;
  }
  return flops / elapsed;
}

}  // namespace drope::DROPE_ISA
