// Operands of mma.m16n8k16 read from swizzled tiles by ldmatrix (sm_80). PTX ISA, "Warp-level
// matrix load instruction: ldmatrix" and "Matrix Fragments for mma.m16n8k16".
#pragma once

#include <cstdint>

#include "cuda/ptx/ldmatrix.h"
#include "cuda/tile/accumulator.h"
#include "cuda/tile/smem_tile.h"

namespace drope::tile {

// Where a lane reads: chunk 2 step + odd of row `row` + lane_row, `row` a multiple of 8. What
// depends on the lane is one number for all steps and rows, so that a loop over them, unrolled, has
// constants for the rest.
template <class Tile>
__device__ __forceinline__ uint32_t lane_address(const Tile& tile, int row, int lane_row, int step,
                                                 int odd) {
  constexpr int kStepsPerSlab = Tile::kSlabCols / 16;
  const int in_slab = Tile::offset(lane_row, odd) ^ (step % kStepsPerSlab * 2 * kChunkBytes);
  return ptx::smem_address(tile.bytes) + static_cast<uint32_t>(in_slab) +
         static_cast<uint32_t>(row * Tile::kSpan + step / kStepsPerSlab * Tile::kSlabBytes);
}

// A (16, 16): rows `row` .. row + 15 of the tile, columns 16 step .. 16 step + 15.
template <class Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile& tile, int row, int step) {
  const int lane = lane_index();
  ptx::ldmatrix_x4(a, lane_address(tile, row, lane % 16, step, lane / 16));
}

// A (16, 16) transposed: columns 16 m16 .. of the tile are A's rows, its rows row .. row + 15 are
// k.
template <class Tile>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const Tile& tile, int row,
                                                  int m16) {
  const int lane = lane_index();
  ptx::ldmatrix_x4_trans(a, lane_address(tile, row, lane % 8 + lane / 16 * 8, m16, lane / 8 % 2));
}

// B (16 k, 16 n) of a tile stored (n, k): rows `row` .. are n, columns 16 step .. are k.
// b[0..1] is the first n8 tile, b[2..3] the second.
template <class Tile>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const Tile& tile, int row, int step) {
  const int lane = lane_index();
  ptx::ldmatrix_x4(b, lane_address(tile, row, lane % 8 + lane / 16 * 8, step, lane / 8 % 2));
}

// B (16 k, 16 n) of a tile stored (k, n): rows `row` .. are k, columns 16 n16 .. are n.
template <class Tile>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const Tile& tile, int row,
                                                  int n16) {
  const int lane = lane_index();
  ptx::ldmatrix_x4_trans(b, lane_address(tile, row, lane % 16, n16, lane / 16));
}

}  // namespace drope::tile
