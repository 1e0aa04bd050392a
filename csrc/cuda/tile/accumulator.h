// The accumulator of 16 rows and kCols columns, spread over a warp: what mma.m16n8k16 leaves in its
// n8 tiles and wgmma.m64nNk16 in each of its warps.
// PTX ISA, "Matrix Fragments for mma.m16n8k16" and "wgmma Matrix D fragment": acc[4j + 2h + e] of
// lane l is row l/4 + 8h, column 8j + 2(l%4) + e. A thread owns two rows (h = 0, 1).
#pragma once

#include <cstdint>

#include "cuda/tile/convert.h"

namespace drope::tile {

inline constexpr int kRowsPerThread = 2;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }

// Row h of this thread within the 16 of its warp.
__device__ __forceinline__ int accumulator_row(int h) { return lane_index() / 4 + 8 * h; }

// Column of acc[4 j + 2 h + e].
__device__ __forceinline__ int accumulator_col(int j, int e) {
  return 8 * j + lane_index() % 4 * 2 + e;
}

// The n8 tile j, as one mma takes it.
template <int kSize>
__device__ __forceinline__ float (&n8_tile(float (&acc)[kSize], int j))[4] {
  return *reinterpret_cast<float (*)[4]>(&acc[4 * j]);
}

// Columns 16 step to 16 step + 15 as the A fragment of a product over them: no shuffle, as two
// neighbouring n8 tiles are laid out like A's two k8 halves.
template <class T, int kSize>
__device__ __forceinline__ void as_a_fragment(T, uint32_t (&a)[4], const float (&acc)[kSize],
                                              int step) {
  const int i = 8 * step;
  a[0] = pack(T{}, acc[i + 0], acc[i + 1]);
  a[1] = pack(T{}, acc[i + 2], acc[i + 3]);
  a[2] = pack(T{}, acc[i + 4], acc[i + 5]);
  a[3] = pack(T{}, acc[i + 6], acc[i + 7]);
}

// A row of the accumulator lies in the four lanes of a quad: the same l/4.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Over eight neighbouring lanes.
__device__ __forceinline__ float sum_of_eight_lanes(float x) {
  x = quad_sum(x);
  return x + __shfl_xor_sync(0xffffffffu, x, 4);
}

__device__ __forceinline__ float warp_sum(float x) {
  x = sum_of_eight_lanes(x);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

}  // namespace drope::tile
