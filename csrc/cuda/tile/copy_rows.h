// Rows of a matrix in global memory to a swizzled tile and back, 16 bytes at a time (sm_80).
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.h"
#include "cuda/tile/smem_tile.h"

namespace drope::tile {

// One row of global memory; invalid rows read as zeros, `data` is a valid address all the same.
struct SourceRow {
  const uint16_t* data;
  bool valid;
};

// Starts the copy of 16 bytes of a row; zeros where the row is invalid or ends before the chunk.
template <class Tile>
__device__ __forceinline__ void copy_chunk_async(Tile& tile, int row, int chunk, SourceRow source,
                                                 int num_channels) {
  const bool valid = source.valid && chunk * kChunkCols < num_channels;
  ptx::cp_async_16(tile.address(row, chunk), valid ? source.data + chunk * kChunkCols : source.data,
                   valid ? kChunkBytes : 0);
}

// How kNumThreads threads share the chunks of a tile: each has one place in a row of a slab, and
// takes it in every kRowsAtOnce-th row of every kSlabsAtOnce-th slab. Neighbouring threads so move
// the 64 or 128 bytes of such a row, and addresses differ by constants from piece to piece.
template <int kNumThreads, class Tile>
struct ThreadChunks {
  static constexpr int kChunksPerSlab = Tile::kSlabCols / kChunkCols;
  static constexpr int kThreadRows = kNumThreads / kChunksPerSlab;
  static constexpr int kRowsAtOnce = kThreadRows < Tile::kRows ? kThreadRows : Tile::kRows;
  static constexpr int kSlabsAtOnce = kThreadRows / kRowsAtOnce;
  static constexpr int kRowSteps = Tile::kRows / kRowsAtOnce;
  static constexpr int kSlabSteps = Tile::kNumSlabs / kSlabsAtOnce;
  static_assert(kNumThreads % kChunksPerSlab == 0 && Tile::kRows % kRowsAtOnce == 0 &&
                Tile::kNumSlabs % kSlabsAtOnce == 0);

  int first_row, first_chunk;

  explicit __device__ __forceinline__ ThreadChunks(int thread) {
    const unsigned t = static_cast<unsigned>(thread);  // divides by shifts
    first_row = t / kChunksPerSlab % kRowsAtOnce;
    first_chunk = t / kChunksPerSlab / kRowsAtOnce * kChunksPerSlab + t % kChunksPerSlab;
  }
  __device__ __forceinline__ int row(int step) const { return first_row + step * kRowsAtOnce; }
  __device__ __forceinline__ int chunk(int step) const {
    return first_chunk + step * kSlabsAtOnce * kChunksPerSlab;
  }
};

// Starts the copy of every row of the tile; row_of(row) is its SourceRow. Channels from
// num_channels on (a multiple of 8) become zeros. All kNumThreads threads of a block call it.
template <int kNumThreads, class Tile, class RowOf>
__device__ __forceinline__ void copy_rows_async(Tile& tile, const RowOf& row_of, int num_channels) {
  using Chunks = ThreadChunks<kNumThreads, Tile>;
  const Chunks chunks(static_cast<int>(threadIdx.x));
#pragma unroll
  for (int i = 0; i < Chunks::kRowSteps; ++i) {
    const SourceRow source = row_of(chunks.row(i));
#pragma unroll
    for (int j = 0; j < Chunks::kSlabSteps; ++j) {
      copy_chunk_async(tile, chunks.row(i), chunks.chunk(j), source, num_channels);
    }
  }
}

// Rows [begin, end) of a matrix, begin < end; its other rows read as zeros and are not touched.
struct RowWindow {
  const uint16_t* data;  // of row 0
  int64_t stride_row;
  int begin, end;
};

// Starts the copy of rows first_row .. of the window to the tile, and zeros to channels from
// num_channels on (a multiple of 8). All kNumThreads threads of a block call it.
template <int kNumThreads, class Tile>
__device__ __forceinline__ void copy_rows_async(Tile& tile, RowWindow window, int first_row,
                                                int num_channels) {
  using Chunks = ThreadChunks<kNumThreads, Tile>;
  const Chunks chunks(static_cast<int>(threadIdx.x));
  const uint16_t* data = window.data + (first_row + chunks.first_row) * window.stride_row;
  if (window.begin <= first_row && first_row + Tile::kRows <= window.end) {
#pragma unroll
    for (int i = 0; i < Chunks::kRowSteps; ++i) {
#pragma unroll
      for (int j = 0; j < Chunks::kSlabSteps; ++j) {
        copy_chunk_async(tile, chunks.row(i), chunks.chunk(j), {data, true}, num_channels);
      }
      data += Chunks::kRowsAtOnce * window.stride_row;
    }
    return;
  }
#pragma unroll 1  // seldom done: registers matter more than time
  for (int i = 0; i < Chunks::kRowSteps; ++i) {
    const int row = first_row + chunks.row(i);
    const int inside = min(max(row, window.begin), window.end - 1);
    const SourceRow source{window.data + inside * window.stride_row, row == inside};
#pragma unroll
    for (int j = 0; j < Chunks::kSlabSteps; ++j) {
      copy_chunk_async(tile, chunks.row(i), chunks.chunk(j), source, num_channels);
    }
  }
}

// Writes rows [0, num_rows) and channels [0, num_channels) of the tile; row_of(row) is the address
// of the row in global memory.
template <int kNumThreads, class Tile, class RowOf>
__device__ __forceinline__ void store_rows(Tile& tile, const RowOf& row_of, int num_rows,
                                           int num_channels, int thread) {
  using Chunks = ThreadChunks<kNumThreads, Tile>;
  const Chunks chunks(thread);
#pragma unroll
  for (int i = 0; i < Chunks::kRowSteps; ++i) {
    const int row = chunks.row(i);
    if (row >= num_rows) break;
#pragma unroll
    for (int j = 0; j < Chunks::kSlabSteps; ++j) {
      const int chunk = chunks.chunk(j);
      if (chunk * kChunkCols < num_channels) {
        *reinterpret_cast<uint4*>(row_of(row) + chunk * kChunkCols) = tile.chunk_at(row, chunk);
      }
    }
  }
}

// All threads of the block: their own copies have landed, and then everybody's.
__device__ __forceinline__ void wait_for_copies() {
  ptx::cp_async_wait_group<0>();
  __syncthreads();
}

}  // namespace drope::tile
