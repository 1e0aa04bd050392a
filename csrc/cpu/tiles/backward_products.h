// The products of the backward pass, by three loops that differ in what stays in registers: B of
// two columns, B of one column, or the sums. Three rules, each measured on an Emerald Rapids, keep
// the products right behind one another: a sum is stored when the next one is under way, since a
// tile that is stored at once stalls the next product; the next tile of A is loaded right after the
// last use of its register; what is as good as read once streams past the L1 cache, which the sums
// need.
#pragma once

#include <cstdint>

#include "cpu/tiles/pack.h"
#include "cpu/tiles/unroll.h"

namespace drope::DROPE_ISA {

// Tiles of an operand: those of one row, or column, of the product follow each other by `step`.
struct TileOperand {
  const float* data;
  int64_t stride, stride_step;
};

struct TileSums {
  float* data;
  int64_t stride_row, stride_column;
};

// What else is done while products run: nothing.
struct NoWork {
  DROPE_INLINE void operator()() const {}
};
inline constexpr NoWork kNoWork;

enum class Sums { kNew, kContinued };

template <int kTileRegister>
DROPE_INLINE void start_sum(const Tiles& tiles, Sums sums, const float* from) {
  if (sums == Sums::kNew) {
    tiles.zero<kTileRegister>();
  } else {
    tiles.load<kTileRegister>(from);
  }
}

// sums(row, column) (+)= a(row, step) b(column, step) for kSteps <= 2 steps, 2 columns. `beside` is
// called after each product.
template <int kSteps, class Beside>
DROPE_INLINE void multiply_columns(const Tiles& tiles, TileOperand a, const TileOperand& b,
                                   Sums start, TileSums sums, int rows, Beside& beside) {
  constexpr int kA = 4, kFirst = 6, kSecond = 7;
  unroll<kSteps>([&](auto step) DROPE_INLINE_LAMBDA {
    tiles.load<step>(b.data + step * b.stride_step);
    tiles.load_streaming<kA + step>(a.data + step * a.stride_step);
    tiles.load<kSteps + step>(b.data + b.stride + step * b.stride_step);
  });
  for (int row = 0; row < rows; ++row) {
    float* second = sums.data + sums.stride_column;
    start_sum<kFirst>(tiles, start, sums.data);
    unroll<kSteps>([&](auto step) DROPE_INLINE_LAMBDA {
      tiles.multiply_add<kFirst, kA + step, step>();
      beside();
    });
    if (row > 0) tiles.store<kSecond>(second - sums.stride_row);
    start_sum<kSecond>(tiles, start, second);
    a.data += a.stride;
    unroll<kSteps>([&](auto step) DROPE_INLINE_LAMBDA {
      tiles.multiply_add<kSecond, kA + step, kSteps + step>();
      beside();
      if (row + 1 < rows) tiles.load_streaming<kA + step>(a.data + step * a.stride_step);
    });
    tiles.store<kFirst>(sums.data);
    sums.data += sums.stride_row;
  }
  tiles.store<kSecond>(sums.data - sums.stride_row + sums.stride_column);
}

template <int kSum>
DROPE_INLINE void begin_sum(const Tiles& tiles, bool stores, float* earlier) {
  if (stores) tiles.store<kSum>(earlier);
  tiles.zero<kSum>();
}

// sums(row, column) = a(row, step) b(column, step) for any number of steps, an even number of rows,
// 2 columns: two rows at a time, whose sums stay in registers. A is loaded a step ahead.
template <int kSteps, class Beside>
DROPE_INLINE void multiply_squares(const Tiles& tiles, TileOperand a, const TileOperand& b,
                                   TileSums sums, int rows, Beside& beside) {
  constexpr int kA = 4, kB = 6;
  tiles.load_streaming<kA>(a.data);
  tiles.load_streaming<kA + 1>(a.data + a.stride);
  for (int row = 0; row < rows; row += 2) {
    float* const earlier = sums.data - 2 * sums.stride_row;
    unroll<kSteps>([&](auto step) DROPE_INLINE_LAMBDA {
      constexpr bool kBegins = step == 0, kEnds = step + 1 == kSteps;
      const bool loads = !kEnds || row + 2 < rows;
      const float* next = kEnds ? a.data + 2 * a.stride : a.data + (step + 1) * a.stride_step;
      tiles.load<kB>(b.data + step * b.stride_step);
      if constexpr (kBegins) begin_sum<0>(tiles, row > 0, earlier);
      tiles.multiply_add<0, kA, kB>();
      beside();
      tiles.load<kB + 1>(b.data + b.stride + step * b.stride_step);
      if constexpr (kBegins) begin_sum<1>(tiles, row > 0, earlier + sums.stride_column);
      tiles.multiply_add<1, kA, kB + 1>();
      if (loads) tiles.load_streaming<kA>(next);
      beside();
      if constexpr (kBegins) begin_sum<2>(tiles, row > 0, earlier + sums.stride_row);
      tiles.multiply_add<2, kA + 1, kB>();
      beside();
      if constexpr (kBegins) {
        begin_sum<3>(tiles, row > 0, earlier + sums.stride_row + sums.stride_column);
      }
      tiles.multiply_add<3, kA + 1, kB + 1>();
      if (loads) tiles.load_streaming<kA + 1>(next + a.stride);
      beside();
    });
    a.data += 2 * a.stride;
    sums.data += 2 * sums.stride_row;
  }
  float* const last = sums.data - 2 * sums.stride_row;
  unroll<4>([&](auto i) DROPE_INLINE_LAMBDA {
    tiles.store<i>(last + i / 2 * sums.stride_row + i % 2 * sums.stride_column);
  });
}

// sums(row) += a(row, step) b(step) for kSteps <= 4 steps, an even number of rows.
template <int kSteps>
DROPE_INLINE void multiply_column(const Tiles& tiles, TileOperand a, const TileOperand& b,
                                  TileSums sums, int rows) {
  constexpr int kA = 4, kSum = 6;
  unroll<kSteps>([&](auto step)
                     DROPE_INLINE_LAMBDA { tiles.load<step>(b.data + step * b.stride_step); });
  tiles.load<kA>(a.data);
  tiles.load<kA + 1>(a.data + (kSteps > 1 ? a.stride_step : a.stride));
  for (int row = 0; row < rows; row += 2) {
    unroll<2>([&](auto odd) DROPE_INLINE_LAMBDA {
      constexpr int kOdd = odd;
      const bool last = kOdd == 1 && row + 2 == rows;
      tiles.load<kSum + kOdd>(sums.data);
      unroll<kSteps>([&](auto step) DROPE_INLINE_LAMBDA {
        constexpr int kRegister = kA + (kOdd * kSteps + step) % 2;
        tiles.multiply_add<kSum + kOdd, kRegister, step>();
        if constexpr (step + 2 < kSteps) {
          tiles.load<kRegister>(a.data + (step + 2) * a.stride_step);
        } else if constexpr (kSteps == 1) {
          if (row + 2 < rows) tiles.load<kRegister>(a.data + 2 * a.stride);
        } else {
          if (!last) tiles.load<kRegister>(a.data + a.stride + (step + 2 - kSteps) * a.stride_step);
        }
      });
      if (kOdd == 1 || row > 0) tiles.store<kSum + 1 - kOdd>(sums.data - sums.stride_row);
      a.data += a.stride;
      sums.data += sums.stride_row;
    });
  }
  tiles.store<kSum + 1>(sums.data - sums.stride_row);
}

}  // namespace drope::DROPE_ISA
