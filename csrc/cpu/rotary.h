// Rows on their way into a kernel or out of it: converted, and rotated where positions exist.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention_params.h"
#include "cpu/block_range.h"
#include "cpu/vec/inline.h"
#include "position.h"

namespace drope::DROPE_ISA {

// A (num_rows, dim) matrix with unit stride inside a row.
template <class Element>
struct Matrix {
  const typename Element::Storage* data;
  int64_t stride_row, num_rows, dim;
};

// How the rows of one matrix rotate.
struct RotaryRows {
  Rotary rotary;
  int64_t dim;             // leading channels that rotate
  bool interleaved;        // pairs (2i, 2i + 1) instead of (i, i + dim / 2)
  const float* turns_hi;   // (dim / 2)
  const float* turns_lo;   // (dim / 2)
  const float* positions;  // (num_rows); null: first_position + row
  int64_t first_position;
  void* prepared = nullptr;  // (num_rows, row length) contiguous, where rotated rows are also kept
  // From tabulate_angles, of rows first_angle and up; null: not tabulated.
  float* angles = nullptr;
  int64_t first_angle = 0;

  DROPE_INLINE float position(int64_t row) const {
    return positions != nullptr ? positions[row] : static_cast<float>(first_position + row);
  }

  // Of pairs [i, i + count), i a multiple of kLanes.
  DROPE_INLINE SinCos<Vec> angle(int64_t row, int64_t i, int count) const {
    if (angles != nullptr) {
      const float* of_pairs = angles + (row - first_angle) * angle_floats(dim) + 2 * i;
      return {load(of_pairs), load(of_pairs + kLanes)};
    }
    return evaluate_angle(row, i, count);
  }

  DROPE_INLINE SinCos<Vec> evaluate_angle(int64_t row, int64_t i, int count) const;

  // Of a row in a table of angles.
  static DROPE_INLINE int64_t angle_floats(int64_t dim) {
    return 2 * ((dim / 2 + kLanes - 1) / kLanes) * kLanes;
  }
};

DROPE_INLINE RotaryRows rotary_rows(const RotaryParams& p, int64_t kv_head, float direction) {
  const int64_t table = p.num_tables > 1 ? kv_head * (p.rotary_dim / 2) : 0;
  return {{p.attention_factor, direction},
          p.rotary_dim,
          p.interleaved,
          p.turns_hi + table,
          p.turns_lo + table,
          nullptr,
          0};
}

DROPE_INLINE RotaryRows query_rotation(const AttentionParams& p, int64_t batch, int64_t kv_head,
                                       float direction) {
  RotaryRows rows = rotary_rows(p.rotary, kv_head, direction);
  if (p.rotary.positions != nullptr) {
    rows.positions = p.rotary.positions + batch * p.rotary.stride_positions_batch;
  } else {
    rows.first_position = query_start(p.mask, batch);
  }
  return rows;
}

DROPE_INLINE RotaryRows key_rotation(const AttentionParams& p, int64_t batch, int64_t kv_head,
                                     float direction) {
  RotaryRows rows = rotary_rows(p.rotary, kv_head, direction);
  if (p.rotary.kv_positions != nullptr) {
    rows.positions = p.rotary.kv_positions + batch * p.rotary.stride_kv_positions_batch;
  }
  return rows;
}

template <class From, class To>
DROPE_INLINE void convert_row(const typename From::Storage* from, typename To::Storage* to,
                              int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, static_cast<uint64_t>(count) * sizeof(*to));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) To::store(to + i, From::load(from + i));
    const int rest = static_cast<int>(count - i);
    if (rest > 0) To::store(to + i, From::load(from + i, rest), rest);
  }
}

// Whole vectors without a mask: masked stores do not forward to the loads that soon follow them.
template <class Element>
DROPE_INLINE Vec load_some(const typename Element::Storage* p, int count) {
  return count == kLanes ? Element::load(p) : Element::load(p, count);
}

// Rounds to From, the narrower of the two types on the way into a kernel, and stores as To.
template <class From, class To>
DROPE_INLINE void store_some(typename To::Storage* p, Vec x, int count) {
  if constexpr (!std::is_same_v<From, To>) x = From::round(x);
  if (count == kLanes) {
    To::store(p, x);
  } else {
    To::store(p, x, count);
  }
}

DROPE_INLINE SinCos<Vec> RotaryRows::evaluate_angle(int64_t row, int64_t i, int count) const {
  return rotary.angle(broadcast(position(row)), load_some<Float32>(turns_hi + i, count),
                      load_some<Float32>(turns_lo + i, count));
}

// Fills the table of `rows` for rows [begin, end): (row, kLanes pairs, sin or cos, pair).
inline void tabulate_angles(const RotaryRows& rows, int64_t begin, int64_t end) {
  const int64_t offset = (begin - rows.first_angle) * RotaryRows::angle_floats(rows.dim);
  float* angles = rows.angles + offset;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < rows.dim / 2; i += kLanes, angles += 2 * kLanes) {
      const int64_t rest = rows.dim / 2 - i;
      const int count = rest < kLanes ? static_cast<int>(rest) : kLanes;
      const SinCos<Vec> angle = rows.evaluate_angle(row, i, count);
      store(angles, angle.sin);
      store(angles + kLanes, angle.cos);
    }
  }
}

// Rotates pairs [i, i + count) of a row whose pairs are (c, c + dim / 2).
template <class From, class To>
DROPE_INLINE void rotate_half_split(const RotaryRows& rows, int64_t row, int64_t i, int count,
                                    const typename From::Storage* from, typename To::Storage* to) {
  const int64_t half = rows.dim / 2;
  const SinCos<Vec> angle = rows.angle(row, i, count);
  Vec x1 = load_some<From>(from + i, count), x2 = load_some<From>(from + half + i, count);
  Rotary::rotate_pair(x1, x2, angle);
  store_some<From, To>(to + i, x1, count);
  store_some<From, To>(to + half + i, x2, count);
}

// Whether rows of `count` channels rotate as a whole, in vectors of pairs whose angles are known.
DROPE_INLINE bool rotates_whole_vectors(const RotaryRows& rows, int64_t count) {
  return rows.angles != nullptr && !rows.interleaved && rows.dim == count &&
         count % (2 * kLanes) == 0;
}

// Rotates `count` rows from `first` on, of which that is true: the loop of rows without a call, a
// test or a rest in it.
template <class Element>
DROPE_INLINE void rotate_whole_vectors(const RotaryRows& rows, int64_t first,
                                       const typename Element::Storage* from, int64_t stride_from,
                                       typename Element::Storage* to, int64_t stride_to,
                                       int64_t count) {
  const int64_t half = rows.dim / 2, stride_angles = RotaryRows::angle_floats(rows.dim);
  const float* angles = rows.angles + (first - rows.first_angle) * stride_angles;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t i = 0; i < half; i += kLanes) {
      Vec x1 = Element::load(from + i), x2 = Element::load(from + half + i);
      Rotary::rotate_pair(x1, x2, SinCos<Vec>{load(angles + 2 * i), load(angles + 2 * i + kLanes)});
      Element::store(to + i, x1);
      Element::store(to + half + i, x2);
    }
    from += stride_from;
    to += stride_to;
    angles += stride_angles;
  }
}

// Rotates pairs [i, i + count) of a row whose pairs are (2c, 2c + 1).
template <class From, class To>
DROPE_INLINE void rotate_interleaved(const RotaryRows& rows, int64_t row, int64_t i, int count,
                                     const typename From::Storage* from, typename To::Storage* to) {
  const int first = count * 2 < kLanes ? count * 2 : kLanes, second = count * 2 - first;
  const SinCos<Vec> angle = rows.angle(row, i, count);
  Vec x1 = load_some<From>(from + 2 * i, first);
  Vec x2 = second > 0 ? load_some<From>(from + 2 * i + kLanes, second) : zero();
  deinterleave(x1, x2);
  Rotary::rotate_pair(x1, x2, angle);
  interleave(x1, x2);
  store_some<From, To>(to + 2 * i, x1, first);
  if (second > 0) store_some<From, To>(to + 2 * i + kLanes, x2, second);
}

// to[c] = rotated from[c], c < count, rounded once, to the narrower of the two element types.
template <class From, class To>
DROPE_INLINE void rotate_row(const RotaryRows& rows, int64_t row,
                             const typename From::Storage* from, typename To::Storage* to,
                             int64_t count) {
  for (int64_t i = 0; i < rows.dim / 2; i += kLanes) {
    const int64_t rest = rows.dim / 2 - i;
    const int pairs = rest < kLanes ? static_cast<int>(rest) : kLanes;
    if (rows.interleaved) {
      rotate_interleaved<From, To>(rows, row, i, pairs, from, to);
    } else {
      rotate_half_split<From, To>(rows, row, i, pairs, from, to);
    }
  }
  if (count > rows.dim) convert_row<From, To>(from + rows.dim, to + rows.dim, count - rows.dim);
}

template <class From, class To>
void copy_row(const RotaryRows& shared_rows, int64_t row, const typename From::Storage* from,
              typename To::Storage* to, int64_t count) {
  const RotaryRows rows = shared_rows;  // a copy: a store could change what a reference leads to
  rotate_row<From, To>(rows, row, from, to, count);
}

template <class From, class To>
DROPE_INLINE void copy_row(const NoPosition&, int64_t, const typename From::Storage* from,
                           typename To::Storage* to, int64_t count) {
  convert_row<From, To>(from, to, count);
}

// Keeps a rotated row, for the backward pass, where the call asked for it.
template <class From, class To>
DROPE_INLINE void keep_row(const RotaryRows& rows, int64_t row, const typename From::Storage* from,
                           int64_t count) {
  if (rows.prepared == nullptr) return;
  auto* kept = static_cast<typename To::Storage*>(rows.prepared) + row * count;
  convert_row<From, To>(from, kept, count);
}

template <class From, class To>
DROPE_INLINE void keep_row(const NoPosition&, int64_t, const typename From::Storage*, int64_t) {}

}  // namespace drope::DROPE_ISA
