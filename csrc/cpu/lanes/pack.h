// Operands of the micro-kernel, packed in 32-bit words of a Dot: kDepth elements that are
// consecutive along the contraction. With words(n) = ceil(n / kDepth):
//   lanes (words(dim), lane): rows of x side by side, the vector operand
//   row panels (rows / kRows, words(dim), kRows): broadcast operand, contraction over channels
//   channel panels (dim / kRows, words(rows), kRows): broadcast operand, contraction over rows
//   channel lanes (words(rows), dim): the vector operand of a contraction over rows
// Missing rows and channels are 0.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes/dot.h"
#include "cpu/lanes/rotary.h"

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

// Rows [row, row + kVecCount * kLanes) of x as the vector operand, packed[w * kVecCount * kLanes +
// lane].
template <class Dot, int kVecCount, class Element, class Position>
void pack_lanes(const Position& position, const Matrix<Element>& x, int64_t row, float* packed) {
  RowStage<Dot> stage;
  prefetch_rows(x, row, kVecCount * kLanes);
  for (int v = 0; v < kVecCount; ++v) {
    for (int i = 0; i < kLanes; ++i) stage.set_row(i, position, x, row + v * kLanes + i);
    stage.transposed(words<Dot>(x.dim), [&](int64_t w, Vec lanes) {
      store(packed + (w * kVecCount + v) * kLanes, lanes);
    });
  }
}

// Rows [row, row + count) of x as row panels. Writes whole groups of kLanes rows.
template <class Dot, class Element, class Position>
void pack_row_panels(const Position& position, const Matrix<Element>& x, int64_t row, int64_t count,
                     float* packed) {
  RowStage<Dot> stage;
  const int64_t panel_words = words<Dot>(x.dim) * kRows;
  for (int64_t group = 0; group < count; group += kLanes) {
    prefetch_rows(x, row + group + kLanes, kLanes);
    for (int i = 0; i < kLanes; ++i) stage.set_row(i, position, x, row + group + i);
    float* panels = packed + group / kRows * panel_words;
    stage.transposed(words<Dot>(x.dim), [&](int64_t w, Vec lanes) {
      store_split(panels + w * kRows, panel_words, lanes);
    });
  }
}

// Rows [row, row + count) of x with words along the rows: word w of channel c, a multiple of kRows,
// and the kRows - 1 channels after it start at packed + w * stride_word + c / kRows *
// stride_channels.
template <class Dot, class Element>
void pack_channels(const Matrix<Element>& x, int64_t row, int64_t count, int64_t stride_word,
                   int64_t stride_channels, float* packed) {
  RowStage<Dot> stage;
  constexpr int64_t kGroup = kLanes / Dot::kDepth;  // words at a time, so that writes are runs
  for (int64_t first = 0; first < words<Dot>(count); first += kGroup) {
    const int64_t num_words = std::min(kGroup, words<Dot>(count) - first);
    prefetch_rows(x, row + first * Dot::kDepth + kLanes, kLanes);
    for (int64_t i = 0; i < num_words * Dot::kDepth; ++i) {
      stage.set_row(i, NoPosition{}, x, row + first * Dot::kDepth + i);
    }
    float* to = packed + first * stride_word;
    for (int64_t channel = 0; channel < x.dim; channel += kRows, to += stride_channels) {
      for (int64_t w = 0; w < num_words; ++w) {
        if constexpr (Dot::kDepth == 1) {
          std::memcpy(to + w * stride_word, stage.row(w) + channel, kRows * sizeof(float));
        } else {
          Dot::interleave_rows(stage.row(2 * w) + channel, stage.row(2 * w + 1) + channel,
                               to + w * stride_word);
        }
      }
    }
  }
}

// Rows [row, row + count) of x as channel panels; count is a multiple of kRows.
template <class Dot, class Element>
void pack_channel_panels(const Matrix<Element>& x, int64_t row, int64_t count, float* packed) {
  pack_channels<Dot>(x, row, count, kRows, words<Dot>(count) * kRows, packed);
}

// Rows [row, row + count) of x as the vector operand of a contraction over rows:
// (words(count), x.dim rounded up to kLanes). Padding channels past a multiple of kRows stay as
// they are.
template <class Dot, class Element>
void pack_channel_lanes(const Matrix<Element>& x, int64_t row, int64_t count, float* packed) {
  pack_channels<Dot>(x, row, count, round_up(x.dim, kLanes), kRows, packed);
}

}  // namespace drope::DROPE_ISA
