// Rotation of the rows of a tile by their positions. The arithmetic of a pair is position.h's; here
// is where pairs lie. Templates take a position policy, NoPosition or Rotary.
#pragma once

#include <cstdint>

#include "../tile/convert.h"
#include "../tile/smem_tile.h"
#include "scalar.h"
#include "sequence.h"

namespace drope::cuda {

// Where each row of a sequence is.
struct Positions {
  const float* table;  // null: first + row
  int64_t first;
  __device__ __forceinline__ float at(int row) const {
    return table != nullptr ? table[row] : static_cast<float>(first + row);
  }
};

__device__ __forceinline__ Positions query_positions(const AttentionParams& params,
                                                     const Sequence& s) {
  const RotaryParams& rotary = params.rotary;
  if (rotary.positions == nullptr) return {nullptr, s.q_start};
  return {rotary.positions + s.batch * rotary.stride_positions_batch + s.first_q, 0};
}

__device__ __forceinline__ Positions key_positions(const AttentionParams& params,
                                                   const Sequence& s) {
  const RotaryParams& rotary = params.rotary;
  if (rotary.kv_positions == nullptr) return {nullptr, 0};
  return {rotary.kv_positions + s.batch * rotary.stride_kv_positions_batch + s.first_k, 0};
}

// The frequencies of one kv head.
struct Rotation {
  const float *turns_hi, *turns_lo;
  Rotary policy;
  int rotary_dim;
  bool interleaved;

  // direction: +1 rotates, -1 undoes it.
  __device__ __forceinline__ Rotation(const RotaryParams& params, int64_t kv_head, float direction)
      : policy{params.attention_factor, direction},
        rotary_dim(static_cast<int>(params.rotary_dim)),
        interleaved(params.interleaved) {
    const int64_t table = params.num_tables > 1 ? kv_head * (rotary_dim / 2) : 0;
    turns_hi = params.turns_hi + table;
    turns_lo = params.turns_lo + table;
  }

  __device__ __forceinline__ int num_pairs() const { return rotary_dim / 2; }
  __device__ __forceinline__ int first_channel(int pair) const {
    return interleaved ? 2 * pair : pair;
  }
  __device__ __forceinline__ int second_channel(int pair) const {
    return interleaved ? 2 * pair + 1 : pair + rotary_dim / 2;
  }
  __device__ __forceinline__ SinCos<Scalar> angle(float position, int pair) const {
    return policy.angle(Scalar{position}, Scalar{turns_hi[pair]}, Scalar{turns_lo[pair]});
  }
};

__device__ __forceinline__ void rotate_pair(float& x1, float& x2, const SinCos<Scalar>& angle) {
  Scalar first{x1}, second{x2};
  Rotary::rotate_pair(first, second, angle);
  x1 = first.x;
  x2 = second.x;
}

// ---- eight pairs of a row at a time -------------------------------------------------------------
// Pairs 8 o .. 8 o + 7 fill two 16-byte chunks: o and o + rotary_dim / 16 when pairs are
// (i, i + rotary_dim / 2), 2 o and 2 o + 1 when they are (2i, 2i + 1).

inline constexpr int kOctet = tile::kChunkCols;

__device__ __forceinline__ bool has_octets(const Rotation& rotation) {
  return rotation.rotary_dim % (2 * kOctet) == 0;
}

// (2i, 2i + 1) to (i, i + 8), and back.
__device__ __forceinline__ void deinterleave(float (&x)[2 * kOctet]) {
  float y[2 * kOctet];
#pragma unroll
  for (int i = 0; i < 2 * kOctet; ++i) y[i] = x[i % kOctet * 2 + i / kOctet];
#pragma unroll
  for (int i = 0; i < 2 * kOctet; ++i) x[i] = y[i];
}

__device__ __forceinline__ void interleave(float (&x)[2 * kOctet]) {
  float y[2 * kOctet];
#pragma unroll
  for (int i = 0; i < 2 * kOctet; ++i) y[i] = x[i % 2 * kOctet + i / 2];
#pragma unroll
  for (int i = 0; i < 2 * kOctet; ++i) x[i] = y[i];
}

// Eight neighbouring pairs with their turns in registers, to be rotated in one row after another.
struct PairOctet {
  float turns_hi[kOctet], turns_lo[kOctet];
  Rotary policy;
  bool interleaved;
  int first_chunk, second_chunk;

  __device__ __forceinline__ PairOctet(const Rotation& rotation, int octet)
      : policy(rotation.policy),
        interleaved(rotation.interleaved),
        first_chunk(interleaved ? 2 * octet : octet),
        second_chunk(interleaved ? 2 * octet + 1 : octet + rotation.rotary_dim / (2 * kOctet)) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      turns_hi[i] = rotation.turns_hi[kOctet * octet + i];
      turns_lo[i] = rotation.turns_lo[kOctet * octet + i];
    }
  }

  // x: the channels of first_chunk, then those of second_chunk.
  __device__ __forceinline__ void rotate(float (&x)[2 * kOctet], float position) const {
    if (interleaved) deinterleave(x);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      rotate_pair(x[i], x[i + kOctet],
                  policy.angle(Scalar{position}, Scalar{turns_hi[i]}, Scalar{turns_lo[i]}));
    }
    if (interleaved) interleave(x);
  }

  template <class T>
  __device__ __forceinline__ void rotate(T, uint4& first, uint4& second, float position) const {
    float x[2 * kOctet];
    tile::unpack_chunk(T{}, first, &x[0]);
    tile::unpack_chunk(T{}, second, &x[kOctet]);
    rotate(x, position);
    first = tile::pack_chunk(T{}, &x[0]);
    second = tile::pack_chunk(T{}, &x[kOctet]);
  }
};

// ---- the rows of a tile ------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void rotate_pair(T, uint16_t& first, uint16_t& second,
                                            const SinCos<Scalar>& angle) {
  float x1 = tile::to_float(T{}, first), x2 = tile::to_float(T{}, second);
  rotate_pair(x1, x2, angle);
  first = tile::from_float(T{}, x1);
  second = tile::from_float(T{}, x2);
}

// Two pairs, the first of them numbered `pair`: the members of each in different registers.
template <class T>
__device__ __forceinline__ void rotate_halves(T, uint32_t& first, uint32_t& second,
                                              const Rotation& rotation, float position, int pair) {
  tile::FloatPair x1 = tile::unpack(T{}, first), x2 = tile::unpack(T{}, second);
  rotate_pair(x1.low, x2.low, rotation.angle(position, pair));
  rotate_pair(x1.high, x2.high, rotation.angle(position, pair + 1));
  first = tile::pack(T{}, x1.low, x1.high);
  second = tile::pack(T{}, x2.low, x2.high);
}

// The pairs of a row that start in the 16-byte chunk `chunk`, where whole chunks are rotated.
// Independent pairs side by side hide each other's latency.
template <class T, class Tile>
__device__ __forceinline__ void rotate_chunk(T, Tile& rows, int row, int chunk,
                                             const Rotation& rotation, float position) {
  uint4& first = rows.chunk_at(row, chunk);
  uint4& second = rows.chunk_at(row, chunk + rotation.num_pairs() / tile::kChunkCols);
  uint4 x1 = first, x2 = second;
  const int pair = chunk * tile::kChunkCols;
  rotate_halves(T{}, x1.x, x2.x, rotation, position, pair);
  rotate_halves(T{}, x1.y, x2.y, rotation, position, pair + 2);
  rotate_halves(T{}, x1.z, x2.z, rotation, position, pair + 4);
  rotate_halves(T{}, x1.w, x2.w, rotation, position, pair + 6);
  first = x1;
  second = x2;
}

// Rotates rows [begin_row, num_rows) of a tile in place; row r is at positions.at(first_row + r).
// The kNumThreads threads numbered `thread` share the work.
template <int kNumThreads, class T, class Tile, class PositionsOf>
__device__ __forceinline__ void rotate_rows(T, Tile& rows, const Rotation& rotation,
                                            const PositionsOf& positions, int first_row,
                                            int num_rows, int thread, int begin_row = 0) {
  const bool in_chunks = !rotation.interleaved && rotation.num_pairs() % tile::kChunkCols == 0;
  const int items_per_row = rotation.num_pairs() / (in_chunks ? tile::kChunkCols : 1);
#pragma unroll 1
  for (int item = thread; item < (num_rows - begin_row) * items_per_row; item += kNumThreads) {
    const int row = begin_row + item / items_per_row, part = item % items_per_row;
    const float position = positions.at(first_row + row);
    if (in_chunks) {
      rotate_chunk(T{}, rows, row, part, rotation, position);
    } else {
      rotate_pair(T{}, rows.element_at(row, rotation.first_channel(part)),
                  rows.element_at(row, rotation.second_channel(part)),
                  rotation.angle(position, part));
    }
  }
}

}  // namespace drope::cuda
