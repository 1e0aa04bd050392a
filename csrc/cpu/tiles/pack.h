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
  stage.transposed(filled * kLanes,
                   [&](int64_t w, const Vec& rows) { store(tiles + w * kLanes, rows); });
  clear_tiles(tiles + filled * kTile, num_steps - filled);
}

// Calls emit(tile, i, words) for the 16 words that rows first + i * stride and second + i * stride
// of x have in each tile of 16 channels, as far as x has channels.
template <class Emit>
DROPE_INLINE void pair_rows(const Matrix<BFloat16>& x, int64_t first, int64_t second,
                            int64_t stride, const Emit& emit) {
  TileStage low, high;
  for (int64_t i = 0; i < kTileRows; ++i) {
    low.set_row(i, NoPosition{}, x, first + i * stride);
    high.set_row(i, NoPosition{}, x, second + i * stride);
  }
  for (int64_t tile = 0; tile < 2 * steps(x.dim); ++tile) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      emit(tile, i,
           to_words(BFloat16::load(low.row(i) + tile * kLanes),
                    BFloat16::load(high.row(i) + tile * kLanes)));
    }
  }
}

// Rows [row, row + 32) of x as `num_tiles` tiles of 16 channels.
inline void pack_channels(const Matrix<BFloat16>& x, int64_t row, int64_t num_tiles, float* tiles) {
  prefetch_rows(x, row + kStep, kStep);
  Vec words[kTileRows];
  pair_rows(x, row, row + 1, 2, [&](int64_t tile, int64_t i, const Vec& pairs) {
    words[i] = pairs;
    if (i + 1 < kTileRows) return;
    transpose(words);
    for (int64_t r = 0; r < kTileRows; ++r) store(tiles + tile * kTile + r * kLanes, words[r]);
  });
  const int64_t filled = 2 * steps(x.dim);
  clear_tiles(tiles + filled * kTile, num_tiles - filled);
}

inline void pack_pairs(const Matrix<BFloat16>& x, int64_t row, int64_t num_tiles, float* tiles) {
  pair_rows(x, row, row + kTileRows, 1, [&](int64_t tile, int64_t i, const Vec& pairs) {
    store(tiles + tile * kTile + i * kLanes, pairs);
  });
  const int64_t filled = 2 * steps(x.dim);
  clear_tiles(tiles + filled * kTile, num_tiles - filled);
}

}  // namespace drope::DROPE_ISA
