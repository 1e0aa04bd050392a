// Rotation of the rows of a tile by their positions. The arithmetic of a pair is position.h's; here
// is where pairs lie. Templates take a position policy, NoPosition or Rotary.
#pragma once

#include <cstdint>

#include "cuda/attention/shared/scalar.h"
#include "cuda/attention/shared/sequence.h"
#include "cuda/tile/convert.h"
#include "cuda/tile/smem_tile.h"

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
