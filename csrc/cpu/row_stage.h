// A few rows of a matrix on their way into packed operands: converted, rotated and padded.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/rotary.h"

namespace drope::DROPE_ISA {

inline constexpr int64_t kMaxHeadDim = 256;

DROPE_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <class Dot>
DROPE_INLINE constexpr int64_t words(int64_t count) {
  return (count + Dot::kDepth - 1) / Dot::kDepth;
}

// A few rows in the element type of a Dot, zero-padded to whole vectors of words.
template <class Dot>
class RowStage {
 public:
  using Operand = typename Dot::Operand;
  using Storage = typename Operand::Storage;

  DROPE_INLINE const Storage* row(int64_t i) const { return rows_[i]; }

  // Row i becomes row `source_row` of x, rotated; 0 if x has no such row.
  template <class Element, class Position>
  DROPE_INLINE void set_row(int64_t i, const Position& position, const Matrix<Element>& x,
                            int64_t source_row) {
    const int64_t padded = round_up(x.dim, kLanes * Dot::kDepth);
    const int64_t filled = 0 <= source_row && source_row < x.num_rows ? x.dim : 0;
    const typename Element::Storage* source = x.data + source_row * x.stride_row;
    if constexpr (std::is_same_v<Element, Operand> && std::is_same_v<Position, NoPosition>) {
      if (filled == padded) {  // nothing to convert, rotate or pad: read in place
        rows_[i] = source;
        return;
      }
    }
    Storage* row = data_ + i * kStride;
    rows_[i] = row;
    if (filled > 0) {
      copy_row<Element, Operand>(position, source_row, source, row, x.dim);
      keep_row<Operand, Element>(position, source_row, row, x.dim);
    }
    if (filled < padded) {
      std::memset(row + filled, 0, static_cast<uint64_t>(padded - filled) * sizeof(Storage));
    }
  }

  // Row i becomes row first + i of x, for all rows of the stage.
  template <class Element, class Position>
  DROPE_INLINE void set_rows(const Position& position, const Matrix<Element>& x, int64_t first) {
    if constexpr (std::is_same_v<Element, Operand> && std::is_same_v<Position, RotaryRows>) {
      if (0 <= first && first + kLanes <= x.num_rows && x.dim % (kLanes * Dot::kDepth) == 0 &&
          rotates_whole_vectors(position, x.dim)) {
        for (int64_t i = 0; i < kLanes; ++i) rows_[i] = data_ + i * kStride;
        rotate_whole_vectors<Element>(position, first, x.data + first * x.stride_row, x.stride_row,
                                      data_, kStride, kLanes);
        for (int64_t i = 0; i < kLanes; ++i) {
          keep_row<Operand, Element>(position, first + i, rows_[i], x.dim);
        }
        return;
      }
    }
    for (int64_t i = 0; i < kLanes; ++i) set_row(i, position, x, first + i);
  }

  // Calls emit(w, vector whose lane i is word w of row i) for w < num_words.
  template <class Emit>
  DROPE_INLINE void transposed(int64_t num_words, const Emit& emit) const {
    for (int64_t w = 0; w < num_words; w += kLanes) {
      Vec column[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        column[i] = load(reinterpret_cast<const float*>(rows_[i]) + w);
      }
      transpose(column);
      if (w + kLanes <= num_words) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) emit(w + i, column[i]);
      } else {
        for (int i = 0; i < num_words - w; ++i) emit(w + i, column[i]);
      }
    }
  }

 private:
  static constexpr int64_t kStride = kMaxHeadDim;
  static_assert(kMaxHeadDim % (kLanes * Dot::kDepth) == 0, "rows must end on a vector");

  const Storage* rows_[kLanes];
  alignas(64) Storage data_[kLanes * kStride];
};

// Asks for rows of x that are packed next: rotation works on one row after the other, so it would
// wait for each of them.
template <class Element>
DROPE_INLINE void prefetch_rows(const Matrix<Element>& x, int64_t row, int64_t count) {
  constexpr int64_t kCacheLine = 64 / sizeof(typename Element::Storage);
  const int64_t end = std::min(row + count, x.num_rows);
  for (int64_t i = std::max<int64_t>(row, 0); i < end; ++i) {
    for (int64_t c = 0; c < x.dim; c += kCacheLine) {
      __builtin_prefetch(x.data + i * x.stride_row + c);
    }
  }
}

}  // namespace drope::DROPE_ISA
