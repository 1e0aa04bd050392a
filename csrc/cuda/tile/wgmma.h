// A warpgroup's products out of shared memory and registers (sm_90a): 64 rows, asynchronous.
// Accumulators: float acc[N / 2] of (64, N), 16 rows a warp as accumulator.h describes.
#pragma once

#include <cstdint>

#include "cuda/ptx/matrix_descriptor.h"
#include "cuda/ptx/stmatrix.h"
#include "cuda/ptx/wgmma_bf16.h"
#include "cuda/ptx/wgmma_f16.h"
#include "cuda/ptx/wgmma_sync.h"
#include "cuda/tile/accumulator.h"
#include "cuda/tile/smem_tile.h"

namespace drope::tile {

inline constexpr int kWarpgroupRows = 64;
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kStepK = 16;  // of one wgmma

template <class Tile>
__device__ constexpr ptx::MatrixSwizzle matrix_swizzle() {
  return Tile::kSpan == 128 ? ptx::MatrixSwizzle::k128Bytes : ptx::MatrixSwizzle::k64Bytes;
}

// Tile (mn, k): its columns are what the product sums over. Of the first step.
template <class Tile>
__device__ __forceinline__ uint64_t descriptor_k_major(const Tile& tile) {
  return ptx::matrix_descriptor(matrix_swizzle<Tile>(), ptx::smem_address(tile.bytes), 0,
                                8 * Tile::kSpan);
}

// Tile (k, mn): its rows are what the product sums over. Of the first step.
template <class Tile>
__device__ __forceinline__ uint64_t descriptor_mn_major(const Tile& tile) {
  return ptx::matrix_descriptor(matrix_swizzle<Tile>(), ptx::smem_address(tile.bytes),
                                Tile::kSlabBytes, 8 * Tile::kSpan);
}

// Bytes from the first step to columns kStepK step of a K-major tile.
template <class Tile>
__device__ constexpr int step_bytes_k_major(int step) {
  constexpr int kStepsPerSlab = Tile::kSlabCols / kStepK;
  return step / kStepsPerSlab * Tile::kSlabBytes + step % kStepsPerSlab * kStepK * 2;
}

// Bytes from the first step to rows kStepK step of an MN-major tile.
template <class Tile>
__device__ constexpr int step_bytes_mn_major(int step) {
  return step * kStepK * Tile::kSpan;
}

// The start address is the lowest field and shared memory ends below its range: no carry.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Starts acc (64, N) = A (64, k) . B (N, k)^T as one group.
template <class T, int kSize, class ATile, class BTile>
__device__ __forceinline__ void multiply_a_bt_async(T, float (&acc)[kSize], const ATile& a_tile,
                                                    const BTile& b_tile) {
  static_assert(ATile::kRows == kWarpgroupRows && BTile::kRows == 2 * kSize &&
                ATile::kCols == BTile::kCols);
  const uint64_t a = descriptor_k_major(a_tile), b = descriptor_k_major(b_tile);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < ATile::kCols / kStepK; ++step) {
    ptx::wgmma_mma_async_ss<ptx::Major::kK, ptx::Major::kK>(
        T{}, acc, advance(a, step_bytes_k_major<ATile>(step)),
        advance(b, step_bytes_k_major<BTile>(step)), step > 0);
  }
  ptx::wgmma_commit_group();
}

// Starts acc (64, N) += A (64, k) . B (k, N) as one group; a_frag: A's fragments, step by step.
template <class T, int kSize, int kSteps, class BTile>
__device__ __forceinline__ void multiply_a_b_async(T, float (&acc)[kSize],
                                                   const uint32_t (&a_frag)[kSteps][4],
                                                   const BTile& b_tile) {
  static_assert(BTile::kRows == kSteps * kStepK && BTile::kCols == 2 * kSize);
  const uint64_t b = descriptor_mn_major(b_tile);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::wgmma_mma_async_rs<ptx::Major::kMN>(T{}, acc, a_frag[step],
                                             advance(b, step_bytes_mn_major<BTile>(step)), 1);
  }
  ptx::wgmma_commit_group();
}

// No instruction: what was computed into acc is computed before the wait that follows. The compiler
// would else do it behind the wait, as nothing in it needs what is waited for.
template <int kSize>
__device__ __forceinline__ void finish_before_wait(float (&acc)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) ptx::wgmma_fence_register(acc[i]);
}

// Returns when all but the newest kPending groups are done; acc belongs to a group that is.
template <int kPending, int kSize>
__device__ __forceinline__ void wait_products(float (&acc)[kSize]) {
  ptx::wgmma_wait_group<kPending>();
#pragma unroll
  for (int i = 0; i < kSize; ++i) ptx::wgmma_fence_register(acc[i]);
}

// An accumulator as A fragments of a product over its columns, rounded to T.
template <class T, int kSize, int kSteps>
__device__ __forceinline__ void as_a_fragments(T, uint32_t (&a_frag)[kSteps][4],
                                               const float (&acc)[kSize]) {
  static_assert(kSize == 8 * kSteps);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) as_a_fragment(T{}, a_frag[step], acc, step);
}

// Rows row .. row + 15 of a tile: a warp's part of an accumulator, rounded to T. A fragment is what
// stmatrix stores, as it is what ldmatrix loads.
template <class T, int kSize, class Tile>
__device__ __forceinline__ void store_fragments(T, const Tile& tile, int row,
                                                const float (&acc)[kSize]) {
  const int lane = lane_index();
#pragma unroll
  for (int step = 0; step < kSize / 8; ++step) {
    uint32_t a[4];
    as_a_fragment(T{}, a, acc, step);
    ptx::stmatrix_x4(tile.address(row + lane % 16, 2 * step + lane / 16), a);
  }
}

}  // namespace drope::tile
