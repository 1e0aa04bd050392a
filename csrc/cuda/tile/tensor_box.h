// A tile of a tensor's rows by TMA (sm_90).
#pragma once

#include <cstdint>

#include "cuda/ptx/tensor_copy.h"
#include "cuda/tensor_map.h"
#include "cuda/tile/smem_tile.h"

namespace drope::tile {

// Starts the copy of Tile::kRows rows from `row` on; their bytes complete on the barrier. The map's
// box is one slab of the tile. What lies outside of the tensor becomes zeros. One thread calls it.
template <class Tile>
__device__ __forceinline__ void copy_box_async(Tile& tile, const cuda::HeadTensorMap& source,
                                               uint64_t* barrier, int row, int head, int batch) {
#pragma unroll
  for (int slab = 0; slab < Tile::kNumSlabs; ++slab) {
    ptx::cp_async_bulk_tensor_4d_load(ptx::smem_address(tile.bytes) + slab * Tile::kSlabBytes,
                                      &source.map, barrier, slab * Tile::kSlabCols, row,
                                      head * source.head_step, batch * source.batch_step);
  }
}

}  // namespace drope::tile
