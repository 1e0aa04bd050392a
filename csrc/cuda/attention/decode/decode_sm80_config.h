// Tiles of the decode kernel on sm_80, and what they cost. Not measured: no GPU was at hand.
//
// Decoding reads each key and value once and computes little, so that all depends on bytes in
// flight. A device of 3.35 TB/s, 132 SMs and some 800 ns from request to data needs
// 3.35e12 * 800e-9 / 132 = 20 KiB of them per SM at any time (an A100 with 2.0 TB/s: 15 KiB).
// Every warp copies and waits for its own keys: it never waits for another warp in the loop, and
// all stages of its ring but the one it multiplies are in flight.
//
//   HEAD_DIM  warps x keys  stages  stage KiB  shared KiB  in flight per SM  blocks an SM
//         64     4 x 16        4       16          66        2 x 48 KiB           2
//         96     4 x 16        3       24          75        2 x 48 KiB           2
//        128     4 x 16        2       32          68        2 x 32 KiB           2
//        256     2 x 16        2       32          72        2 x 32 KiB           2
//
// Two stages at 128 and 256: three would leave one block per SM of an A100, and none on devices
// with 99 KiB. Rows of the tile are (query, head of the group) pairs: 16 serve one token of up to
// 16 heads per kv head; where there are more, 32 rows share one read of the keys (not at 256,
// where acc_o of 32 rows alone would be 256 registers of a thread).
//
// Instructions must fit into the time of the copies as well. Per 16 keys a warp issues some 540
// (64), 600 (96), 700 (128) or 940 (256) of them without rotation, by the code of nvcc 13.0; at the
// full bandwidth of the device above, its quarter of an SM has 1130, 1700, 2260 or 4520 cycles.
// Rotating a raw cache adds 66 for each pair of channels of each key, shared by 32 lanes: 1060 at
// 64, 2110 at 128. Arithmetic, not memory, is the limit there, at 70 to 80 % of the bandwidth; a
// rotated cache has none of it.
#pragma once

#include "cuda/attention/shared/exponent.h"
#include "cuda/tile/smem_tile.h"

namespace drope::cuda {

template <int kHeadDim, int kRows, int kWarps, int kRing>
struct DecodeTiles {
  static constexpr int HEAD_DIM = kHeadDim, BLOCK_M = kRows;
  static constexpr int kKeysPerWarp = 16;
  static constexpr int kNumWarps = kWarps, kNumThreads = 32 * kWarps;
  static constexpr int BLOCK_KV = kWarps * kKeysPerWarp;
  static constexpr int kM16 = BLOCK_M / 16;
  static constexpr int kStages = kRing;
  static constexpr int kBlocksPerSm = 2;

  // One warp's keys of one kv block.
  struct Stage {
    tile::SmemTile<kKeysPerWarp, HEAD_DIM> k, v;
  };
  // What each warp found, once all have left the ring. Rows are padded by 8 floats: the eight rows
  // that a warp writes at once then start at eight different banks.
  struct Parts {
    float out[kNumWarps][BLOCK_M][HEAD_DIM + 8];
    RowState state[kNumWarps][BLOCK_M];
  };
  struct Smem {
    tile::SmemTile<BLOCK_M, HEAD_DIM> q;
    union {
      Stage ring[kNumWarps][kStages];
      Parts parts;
    };
  };
  static_assert(sizeof(Smem) <= 81 * 1024, "two blocks on an SM of 164 KiB");
};

// BLOCK_M is 16 or, up to HEAD_DIM 128, 32.
template <int HEAD_DIM, int BLOCK_M>
struct DecodeSm80Config;
template <int BLOCK_M>
struct DecodeSm80Config<64, BLOCK_M> : DecodeTiles<64, BLOCK_M, 4, 4> {};
template <int BLOCK_M>
struct DecodeSm80Config<96, BLOCK_M> : DecodeTiles<96, BLOCK_M, 4, 3> {};
template <int BLOCK_M>
struct DecodeSm80Config<128, BLOCK_M> : DecodeTiles<128, BLOCK_M, 4, 2> {};
template <>
struct DecodeSm80Config<256, 16> : DecodeTiles<256, 16, 2, 2> {};

}  // namespace drope::cuda
