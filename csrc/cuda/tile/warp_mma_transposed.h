// A warp's products of which an operand is used transposed (sm_80), as the backward pass needs
// them. acc (16 kM16, kCols) float32, one accumulator of 16 rows for each m16.
#pragma once

#include "cuda/tile/warp_mma.h"

namespace drope::tile {

// acc += A^T . B: tiles stored (k, m) and (k, n), from columns 16 a_m16 and 16 b_n16 on.
// kSteps: k / 16.
template <int kSteps, class T, int kM16, int kSize, class ATile, class BTile>
__device__ __forceinline__ void multiply_at_b(T, float (&acc)[kM16][kSize], const ATile& a_tile,
                                              int a_m16, const BTile& b_tile, int b_n16) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[kM16][4];
#pragma unroll
    for (int m = 0; m < kM16; ++m) load_a_transposed(a[m], a_tile, 16 * step, a_m16 + m);
#pragma unroll
    for (int n16 = 0; n16 < kSize / 8; ++n16) {
      uint32_t b[4];
      load_b_transposed(b, b_tile, 16 * step, b_n16 + n16);
      mma_n16(T{}, acc, a, b, n16);
    }
  }
}

}  // namespace drope::tile
