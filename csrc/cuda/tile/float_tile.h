// A float32 matrix in shared memory, for what is worked on row by row before it is rounded.
#pragma once

#include "cuda/tile/accumulator.h"

namespace drope::tile {

template <int ROWS, int COLS>
struct FloatTile {
  static constexpr int kRows = ROWS, kCols = COLS;
  // The four rows that half a warp stores to at once meet four groups of eight banks.
  static constexpr int kStride = COLS + 8;
  static_assert(COLS % 32 == 0);

  alignas(16) float values[ROWS * kStride];

  __device__ __forceinline__ float* row(int index) { return values + index * kStride; }
};

// factor times the accumulator, to rows first_row .. and columns first_col .. of the tile.
template <int kSize, class Tile>
__device__ __forceinline__ void store_accumulator(Tile& tile, int first_row, int first_col,
                                                  const float (&acc)[kSize], float factor) {
#pragma unroll
  for (int i = 0; i < kSize; i += 2) {
    float* const to =
        tile.row(first_row + accumulator_row(i / 2 % 2)) + first_col + accumulator_col(i / 4, 0);
    *reinterpret_cast<float2*>(to) = make_float2(factor * acc[i], factor * acc[i + 1]);
  }
}

}  // namespace drope::tile
