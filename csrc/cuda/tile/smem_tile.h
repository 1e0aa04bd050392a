// A matrix of 16-bit elements in shared memory, laid out as TMA writes it and wgmma reads it, so
// that both architectures share one layout. Columns are cut into slabs of one swizzle span (128
// bytes, or 64 where 64 columns do not divide the width); a slab holds its rows one after the
// other, and the 16-byte chunks of a row are XORed with bits of the row, so that eight consecutive
// rows of one chunk meet eight different bank groups. PTX ISA, "Swizzling modes" of tensor copies.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.h"

namespace drope::tile {

inline constexpr int kChunkCols = 8;  // 16 bytes
inline constexpr int kChunkBytes = 16;

template <int ROWS, int COLS>
struct SmemTile {
  static constexpr int kRows = ROWS, kCols = COLS;
  static constexpr int kSlabCols = COLS % 64 == 0 ? 64 : 32;
  static constexpr int kNumSlabs = COLS / kSlabCols;
  static constexpr int kSpan = 2 * kSlabCols;  // bytes of one row of a slab: the swizzle span
  static constexpr int kSlabBytes = ROWS * kSpan;
  static constexpr int kNumChunks = COLS / kChunkCols;  // of one row
  static constexpr int kBytes = ROWS * COLS * 2;
  static_assert(COLS % kSlabCols == 0 && ROWS % 8 == 0);

  alignas(1024) unsigned char bytes[kBytes];

  // Byte offset of 16-byte chunk `chunk` (columns 8 chunk to 8 chunk + 7) of `row`.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    constexpr int kChunksPerSlab = kSlabCols / kChunkCols;
    const int slab = chunk / kChunksPerSlab, in_slab = chunk % kChunksPerSlab;
    const int flipped = in_slab ^ ((row * kSpan >> 7) & (kChunksPerSlab - 1));
    return slab * kSlabBytes + row * kSpan + flipped * kChunkBytes;
  }

  __device__ __forceinline__ uint32_t address(int row, int chunk) const {
    return ptx::smem_address(bytes) + offset(row, chunk);
  }

  // The chunk for ordinary loads and stores.
  __device__ __forceinline__ uint4& chunk_at(int row, int chunk) {
    return *reinterpret_cast<uint4*>(bytes + offset(row, chunk));
  }

  // One element. Columns 2i and 2i + 1 are neighbours.
  __device__ __forceinline__ uint16_t& element_at(int row, int col) {
    return *reinterpret_cast<uint16_t*>(bytes + offset(row, col / kChunkCols) +
                                        col % kChunkCols * 2);
  }

  // Columns col and col + 1, col even.
  __device__ __forceinline__ uint32_t& pair_at(int row, int col) {
    return *reinterpret_cast<uint32_t*>(bytes + offset(row, col / kChunkCols) +
                                        col % kChunkCols * 2);
  }
};

}  // namespace drope::tile
