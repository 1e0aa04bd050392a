// A warp's products out of shared memory and registers (sm_80): mma.sync on fragments.
// acc (16 kM16, kCols) float32, one accumulator of 16 rows for each m16.
#pragma once

#include <cstdint>

#include "cuda/ptx/mma.h"
#include "cuda/tile/fragment.h"

namespace drope::tile {

// acc[.] += a[.] (16, 16) . b (16 k, 16 n); n16: which 16 columns of acc.
template <class T, int kM16, int kSize>
__device__ __forceinline__ void mma_n16(T, float (&acc)[kM16][kSize], const uint32_t (&a)[kM16][4],
                                        const uint32_t (&b)[4], int n16) {
#pragma unroll
  for (int m = 0; m < kM16; ++m) {
    ptx::mma_m16n8k16(T{}, n8_tile(acc[m], 2 * n16), a[m], b[0], b[1]);
    ptx::mma_m16n8k16(T{}, n8_tile(acc[m], 2 * n16 + 1), a[m], b[2], b[3]);
  }
}

// acc += A . B^T: A is rows a_row .. of a tile (rows, k), B rows b_row .. of a tile (n, k), both in
// shared memory. kSteps: k / 16.
template <int kSteps, class T, int kM16, int kSize, class ATile, class BTile>
__device__ __forceinline__ void multiply_a_bt(T, float (&acc)[kM16][kSize], const ATile& a_tile,
                                              int a_row, const BTile& b_tile, int b_row) {
  constexpr int kStepsPerSlab = ATile::kSlabCols / 16;
  static_assert(kSteps % kStepsPerSlab == 0);
#pragma unroll 1  // within a slab addresses differ by constants; more at once costs registers
  for (int slab = 0; slab < kSteps; slab += kStepsPerSlab) {
#pragma unroll
    for (int step = 0; step < kStepsPerSlab; ++step) {
      uint32_t a[kM16][4];
#pragma unroll
      for (int m = 0; m < kM16; ++m) load_a(a[m], a_tile, a_row + 16 * m, slab + step);
#pragma unroll
      for (int n16 = 0; n16 < kSize / 8; ++n16) {
        uint32_t b[4];
        load_b(b, b_tile, b_row + 16 * n16, slab + step);
        mma_n16(T{}, acc, a, b, n16);
      }
    }
  }
}

// acc += P . B: P (16 kM16, k) is the accumulator acc_p rounded to T; B is rows b_row .. of a tile
// stored (k, n), from column 16 b_n16 on.
template <class T, int kM16, int kSize, int kSizeP, class BTile>
__device__ __forceinline__ void multiply_p_b(T, float (&acc)[kM16][kSize],
                                             const float (&acc_p)[kM16][kSizeP],
                                             const BTile& b_tile, int b_row = 0, int b_n16 = 0) {
#pragma unroll
  for (int step = 0; step < kSizeP / 8; ++step) {
    uint32_t a[kM16][4];
#pragma unroll
    for (int m = 0; m < kM16; ++m) as_a_fragment(T{}, a[m], acc_p[m], step);
#pragma unroll
    for (int n16 = 0; n16 < kSize / 8; ++n16) {
      uint32_t b[4];
      load_b_transposed(b, b_tile, b_row + 16 * step, b_n16 + n16);
      mma_n16(T{}, acc, a, b, n16);
    }
  }
}

}  // namespace drope::tile
