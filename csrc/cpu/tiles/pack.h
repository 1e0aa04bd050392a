// Operands of tile products, packed as tiles of 16 rows of 16 words, a word two bf16 numbers that
// are consecutive along the contraction. With steps(n) = ceil(n / 32), the tiles of a contraction:
//   rows (step of channels, row, word)         A: contraction over channels
//   columns (step of channels, word, row)      B: the same
//   channels (tile of channels, channel, word) A: contraction over 32 rows, in pairs (2i, 2i + 1)
//   pairs (tile of channels, word, channel)    B: contraction over 32 rows, in pairs (i, i + 16)
// Missing rows and channels are 0.
#pragma once

#include <cstdint>

#include "cpu/row_stage.h"

namespace drope::DROPE_ISA {

static_assert(kLanes == 16, "a vector is a row of a tile");

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kTile = kTileRows * kLanes;  // words
inline constexpr int64_t kStep = 2 * kLanes;          // numbers that a tile contracts

struct TileWords {
  using Operand = BFloat16;
  static constexpr int kDepth = 2;
};
using TileStage = RowStage<TileWords>;

DROPE_INLINE int64_t steps(int64_t count) { return (count + kStep - 1) / kStep; }

DROPE_INLINE Vec load_words(const uint16_t* numbers) {
  return load(reinterpret_cast<const float*>(numbers));
}

DROPE_INLINE void clear_tiles(float* tiles, int64_t count) {
  for (int64_t i = 0; i < count * kTile; i += kLanes) store(tiles + i, zero());
}

// Rows [row, row + 16) of x as `num_steps` tiles.
template <class Position>
void pack_rows(const Position& position, const Matrix<BFloat16>& x, int64_t row, int64_t num_steps,
               float* tiles) {
  TileStage stage;
  prefetch_rows(x, row + kTileRows, kTileRows);
  stage.set_rows(position, x, row);
  const int64_t filled = steps(x.dim);
  for (int64_t step = 0; step < filled; ++step, tiles += kTile) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      store(tiles + i * kLanes, load_words(stage.row(i) + step * kStep));
    }
  }
  clear_tiles(tiles, num_steps - filled);
}

template <class Position>
void pack_columns(const Position& position, const Matrix<BFloat16>& x, int64_t row,
                  int64_t num_steps, float* tiles) {
  TileStage stage;
  prefetch_rows(x, row + kTileRows, kTileRows);
  stage.set_rows(position, x, row);
  const int64_t filled = steps(x.dim);
  for (int64_t step = 0; step < filled; ++step, tiles += kTile) {
    const uint16_t* rows[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) rows[i] = stage.row(i) + step * kStep;
    transpose_words(rows, tiles);
  }
  clear_tiles(tiles, num_steps - filled);
}

// The rows that 16 words along the rows of x are made of: first + i * stride, and one that is
// `apart` rows further.
class PairStage {
 public:
  DROPE_INLINE PairStage(const Matrix<BFloat16>& x, int64_t first, int64_t stride, int64_t apart) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      low_.set_row(i, NoPosition{}, x, first + i * stride);
      high_.set_row(i, NoPosition{}, x, first + i * stride + apart);
    }
  }
  // Calls emit(tile, low, high) for each tile of 16 channels, with where its rows start.
  template <class Emit>
  DROPE_INLINE void each_tile(int64_t num_tiles, const Emit& emit) const {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const uint16_t *low[kTileRows], *high[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) {
        low[i] = low_.row(i) + tile * kLanes;
        high[i] = high_.row(i) + tile * kLanes;
      }
      emit(tile, low, high);
    }
  }

 private:
  TileStage low_, high_;
};

// Rows [row, row + 32) of x as `num_tiles` tiles of 16 channels.
inline void pack_channels(const Matrix<BFloat16>& x, int64_t row, int64_t num_tiles, float* tiles) {
  prefetch_rows(x, row + kStep, kStep);
  const int64_t filled = 2 * steps(x.dim);
  PairStage(x, row, 2, 1)
      .each_tile(filled,
                 [&](int64_t tile, const uint16_t* const* low, const uint16_t* const* high) {
                   transpose_pairs(low, high, tiles + tile * kTile);
                 });
  clear_tiles(tiles + filled * kTile, num_tiles - filled);
}

inline void pack_pairs(const Matrix<BFloat16>& x, int64_t row, int64_t num_tiles, float* tiles) {
  const int64_t filled = 2 * steps(x.dim);
  PairStage(x, row, 1, kTileRows)
      .each_tile(filled,
                 [&](int64_t tile, const uint16_t* const* low, const uint16_t* const* high) {
                   for (int64_t i = 0; i < kTileRows; ++i) {
                     store(tiles + tile * kTile + i * kLanes, pair_words(low[i], high[i]));
                   }
                 });
  clear_tiles(tiles + filled * kTile, num_tiles - filled);
}

}  // namespace drope::DROPE_ISA
