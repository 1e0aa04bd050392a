// An accumulator of 16 rows, rounded, into a swizzled tile of shared memory.
#pragma once

#include <cstdint>

#include "cuda/tile/accumulator.h"
#include "cuda/tile/convert.h"
#include "cuda/tile/smem_tile.h"

namespace drope::tile {

// Rows row .. row + 15 and columns first_col .. of the tile. The eight rows of a store meet eight
// bank groups, the four lanes of a row share a chunk.
template <class T, int kSize, class Tile>
__device__ __forceinline__ void store_accumulator(T, Tile& tile, int row, const float (&acc)[kSize],
                                                  int first_col = 0) {
#pragma unroll
  for (int i = 0; i < kSize; i += 2) {
    const int h = i / 2 % 2;
    tile.pair_at(row + accumulator_row(h), first_col + accumulator_col(i / 4, 0)) =
        pack(T{}, acc[i], acc[i + 1]);
  }
}

}  // namespace drope::tile
