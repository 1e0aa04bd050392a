// Tiles of the forward kernel on sm_80, and what they cost. Not measured: no GPU was at hand.
//
// Every configuration fits the 99 KiB of a block on sm_86, sm_89 and sm_120, which run this code
// too. Registers of a thread are dominated by its share of two float32 accumulators, acc_o
// (BLOCK_Q, HEAD_DIM) and acc_s (BLOCK_Q, BLOCK_KV).
//
//   HEAD_DIM  BLOCK_Q x BLOCK_KV  warps x rows  shared KiB: q + k + v + plan  acc_o + acc_s  an SM
//         64      128 x 128          4 x 32      16 + 16 + 16 + 1 = 49           64 + 128  2 blocks
//         96      128 x  64          4 x 32      24 + 12 + 12 + 1 = 49           96 +  64  2
//        128      128 x  64          4 x 32      32 + 16 + 16 + 1 = 65          128 +  64  2
//        256      128 x  32          8 x 16      64 + 16 + 16 + 1 = 97          128 +  16  1
//
// 32 rows a warp: the 512 bytes of k or v that one ldmatrix reads feed four mma, 8 cycles of an
// A100's tensor cores and 4 of its shared memory; 16 rows would keep both equally busy. At HEAD_DIM
// 256 acc_o of 32 rows alone would be 256 registers. Eight warps of 16 rows then hide each other's
// latency, and 128 queries, not 64, share a key: at the full 312 TFLOP/s they ask L2 for 2.4 TB/s,
// where 64 would ask for 4.9.
#pragma once

#include "cuda/attention/shared/block_range.h"
#include "cuda/attention/shared/work_tile.h"
#include "cuda/tile/copy_rows.h"
#include "cuda/tile/smem_tile.h"

namespace drope::cuda {

// What a block computes. It waits in shared memory, out of the registers of the loop.
struct ForwardPlan {
  WorkTile work;
  int kv_head;
  BlockRange kv_blocks;
  TileVisibility visible;
  tile::RowWindow q, k, v;
};

template <int kHeadDim, int kBlockQ, int kBlockKv, int kWarps, int kBlocks>
struct ForwardTiles {
  static constexpr int HEAD_DIM = kHeadDim, BLOCK_Q = kBlockQ, BLOCK_KV = kBlockKv;
  static constexpr int kNumWarps = kWarps, kNumThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = kBlocks;
  static constexpr int kRowsPerWarp = BLOCK_Q / kWarps;
  static constexpr int kM16 = kRowsPerWarp / 16;  // accumulators of 16 rows a warp

  struct Smem {
    union {
      tile::SmemTile<BLOCK_Q, HEAD_DIM> q;
      tile::SmemTile<kRowsPerWarp, HEAD_DIM> out[kNumWarps];  // in the end
    };
    tile::SmemTile<BLOCK_KV, HEAD_DIM> k, v;
    ForwardPlan plan;
  };
  static_assert(sizeof(Smem) <= 99 * 1024);
  // An SM of an A100: 164 KiB of shared memory, 1 of them the system's for each block, and 64 Ki
  // registers, handed out to warps in units of 8 a thread.
  static_assert(kBlocks * (sizeof(Smem) + 1024) <= 164 * 1024);
  static_assert(kBlocks * kNumThreads * 256 <= 64 * 1024);
  static_assert(BLOCK_Q % (16 * kWarps) == 0);
};

template <int HEAD_DIM>
struct ForwardSm80Config;
template <>
struct ForwardSm80Config<64> : ForwardTiles<64, 128, 128, 4, 2> {};
template <>
struct ForwardSm80Config<96> : ForwardTiles<96, 128, 64, 4, 2> {};
template <>
struct ForwardSm80Config<128> : ForwardTiles<128, 128, 64, 4, 2> {};
template <>
struct ForwardSm80Config<256> : ForwardTiles<256, 128, 32, 8, 1> {};

}  // namespace drope::cuda
