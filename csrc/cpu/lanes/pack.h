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

#include "cpu/lanes/dot.h"
#include "cpu/row_stage.h"

namespace drope::DROPE_ISA {

// Rows [row, row + kVecCount * kLanes) of x as the vector operand, packed[w * kVecCount * kLanes +
// lane].
template <class Dot, int kVecCount, class Element, class Position>
void pack_lanes(const Position& position, const Matrix<Element>& x, int64_t row, float* packed) {
  RowStage<Dot> stage;
  prefetch_rows(x, row, kVecCount * kLanes);
  for (int v = 0; v < kVecCount; ++v) {
    stage.set_rows(position, x, row + v * kLanes);
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
    stage.set_rows(position, x, row + group);
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
