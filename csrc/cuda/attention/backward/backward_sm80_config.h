// Tiles of the backward kernels on sm_80, and what they cost. Not measured: no GPU was at hand.
//
// backward_sm80_kernel: a block owns BLOCK_KV keys, a warp 16 kM16 of them. Scores are computed
// transposed, (keys, queries), kSlice queries at a time, so that p and dS are the A operands of
// dv += p^T dO and dk += dS^T q without leaving their registers; dS alone passes through shared
// memory, for dq = dS k, where the warps share out (BLOCK_Q, HEAD_DIM). Columns of the table:
// shared KiB of k + v + q + dO + dS; float32 accumulators a thread, dk and dv beside either s and
// dp of a slice or dq of a pass; blocks an SM.
//
//   HEAD_DIM  BLOCK_KV x BLOCK_Q / kSlice  warps  shared                       accumulators  blocks
//         64     128 x 64 / 16               4    16 + 16 +  8 +  8 + 16 = 64  128 + 32 | 32    2
//         96      64 x 64 / 64               4    12 + 12 + 12 + 12 +  8 = 56   96 + 64 | 48    2
//        128      64 x 64 / 32               4    16 + 16 + 16 + 16 +  8 = 72  128 + 32 | 32    2
//        256      64 x 16 / 16             4 x 2  32 + 32 +  8 +  8 +  4 = 84  128 + 16 | 16    1
//
// 2 x 128 threads of 255 registers, and 2 x 74 KiB of the 164 of an A100 (2 KiB hold what a query
// has besides its channels, and the mask), are an SM. There is room for one q block only: while one
// block waits for its copies, which start before dq = dS k, the other multiplies. Slices and passes
// are as large as leaves ptxas the 95 registers that addresses and operands in flight ask for. For
// an mma, 2 cycles of an A100's tensor cores, ldmatrix reads 128 bytes (1 cycle of shared memory)
// for dv and dk where a warp has 32 keys, 256 where it has 16; 256 or less for dq; 384 for scores,
// or 320 at HEAD_DIM 96.
//
// At HEAD_DIM 256 dk and dv of 16 keys would be 256 registers: two warps share the channels of 16
// keys, and both compute their scores, 1.4 times the products. Every configuration fits the 99 KiB
// of a block on sm_86, sm_89 and sm_120, where one block is an SM.
//
// backward_sm80_dq_kernel (deterministic calls): a block owns kDqBlockQ queries, a warp 16, and
// passes over keys kDqBlockKv at a time; q, dO, k and v take 32, 48, 64 and 96 KiB. It computes
// scores and dP once more: 7 products where 5 would do.
#pragma once

namespace drope::cuda {

template <int kHeadDim, int kBlockKv, int kBlockQ, int kSliceQ, int kKeyWarps, int kChannelWarps>
struct BackwardTiles {
  static constexpr int HEAD_DIM = kHeadDim, BLOCK_KV = kBlockKv, BLOCK_Q = kBlockQ;
  static constexpr int kSlice = kSliceQ;
  static constexpr int kWarpsPerKeys = kChannelWarps;  // that share out the channels of dk and dv
  static constexpr int kNumThreads = 32 * kKeyWarps * kChannelWarps;
  static constexpr int kBlocksPerSm = 256 / kNumThreads;
  static constexpr int kRowsPerWarp = BLOCK_KV / kKeyWarps;
  static constexpr int kM16 = kRowsPerWarp / 16;                 // accumulators of 16 keys
  static constexpr int kColsPerWarp = HEAD_DIM / kWarpsPerKeys;  // channels of dk and dv

  // dq of a q block: the warps' parts, side by side.
  static constexpr int kGradQWarpRows = BLOCK_Q >= 32 ? 32 : 16;
  static constexpr int kGradQWarpsDown = BLOCK_Q / kGradQWarpRows;
  static constexpr int kGradQWarpCols = HEAD_DIM * kGradQWarpsDown * 32 / kNumThreads;
  static constexpr int kGradQM16 = kGradQWarpRows / 16;
  static constexpr int kGradQPasses = kGradQWarpCols > 48 ? 2 : 1;

  // The kernel of deterministic dq.
  static constexpr int kDqBlockQ = 64, kDqBlockKv = HEAD_DIM > 128 ? 32 : 64;
  static constexpr int kDqNumThreads = kDqBlockQ / 16 * 32;
  static constexpr int kDqBlocksPerSm = HEAD_DIM > 128 ? 1 : 2;

  static_assert(BLOCK_KV % (16 * kKeyWarps) == 0 && BLOCK_Q % kSlice == 0 && kSlice % 16 == 0);
  static_assert(kColsPerWarp % 16 == 0 && kGradQWarpCols % 16 == 0);
  static_assert(BLOCK_KV <= kNumThreads && BLOCK_Q <= kNumThreads);  // a thread loads one of each
};

template <int HEAD_DIM>
struct BackwardSm80Config;
template <>
struct BackwardSm80Config<64> : BackwardTiles<64, 128, 64, 16, 4, 1> {};
template <>
struct BackwardSm80Config<96> : BackwardTiles<96, 64, 64, 64, 4, 1> {};
template <>
struct BackwardSm80Config<128> : BackwardTiles<128, 64, 64, 32, 4, 1> {};
template <>
struct BackwardSm80Config<256> : BackwardTiles<256, 64, 16, 16, 4, 2> {};

constexpr int backward_block_q(int head_dim) {
  return head_dim > 128 ? BackwardSm80Config<256>::BLOCK_Q : BackwardSm80Config<128>::BLOCK_Q;
}
static_assert(backward_block_q(64) == BackwardSm80Config<64>::BLOCK_Q);
static_assert(backward_block_q(96) == BackwardSm80Config<96>::BLOCK_Q);

}  // namespace drope::cuda
