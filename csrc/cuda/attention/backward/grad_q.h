// dq of calls that need not be deterministic: blocks of keys add to float32 sums in the workspace,
// and one pass in the end makes the tensor of them.
//
// The sums of a q block lie as the threads of backward_sm80_kernel hold them, accumulator element
// after accumulator element, so that the 32 additions of a warp are one line of 128 bytes.
#pragma once

#include "cuda/attention/backward/backward_rows.h"
#include "cuda/attention/backward/backward_sm80_config.h"
#include "cuda/attention/backward/grad_rows.h"
#include "cuda/attention/shared/work_tile.h"
#include "cuda/ptx/reduce.h"
#include "cuda/tile/warp_mma_transposed.h"

namespace drope::cuda {

// A warp's part of dq of a q block, in kPasses of kM16 accumulators side by side.
template <class Config>
struct GradQPart {
  static constexpr int kM16 = Config::kGradQM16, kPasses = Config::kGradQPasses;
  static constexpr int kPassCols = Config::kGradQWarpCols / kPasses, kSize = kPassCols / 2;
  static_assert(kPassCols % 16 == 0);
  static_assert(kPasses * kM16 * kSize * Config::kNumThreads == Config::BLOCK_Q * Config::HEAD_DIM);

  static __device__ __forceinline__ int first_row() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return warp % Config::kGradQWarpsDown * Config::kGradQWarpRows;
  }
  static __device__ __forceinline__ int first_col(int pass) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return warp / Config::kGradQWarpsDown * Config::kGradQWarpCols + pass * kPassCols;
  }
  // From this thread's first sum of a pass to that of element i of accumulator m: constants, so
  // that one address serves all.
  static constexpr int kSumsOfPass = kM16 * kSize * Config::kNumThreads;
  static __device__ constexpr int offset(int m, int i) {
    return (m * kSize + i) * Config::kNumThreads;
  }
};

// dq += (ratio dS) k for the queries of a block: grad_s (keys, queries), k (keys, channels).
template <class Config, class T, class GradSTile, class KeyTile>
__device__ __forceinline__ void add_grad_q(T, float* sums, const GradSTile& grad_s,
                                           const KeyTile& k) {
  using Part = GradQPart<Config>;
  float* first_sum = sums + threadIdx.x;
#pragma unroll 1  // unrolled, the passes' operands would not fit the registers
  for (int pass = 0; pass < Part::kPasses; ++pass) {
    float acc_dq[Part::kM16][Part::kSize] = {};
    tile::multiply_at_b<Config::BLOCK_KV / 16>(T{}, acc_dq, grad_s, Part::first_row() / 16, k,
                                               Part::first_col(pass) / 16);
#pragma unroll
    for (int m = 0; m < Part::kM16; ++m) {
#pragma unroll
      for (int i = 0; i < Part::kSize; ++i) {
        ptx::red_add_f32(first_sum + Part::offset(m, i), acc_dq[m][i]);
      }
    }
    first_sum += Part::kSumsOfPass;
  }
}

// Sums -> R^T -> grad_factor -> 16 bits.
template <class Config, class T, class Position>
__global__ void __launch_bounds__(Config::kNumThreads)
    grad_q_sm80_kernel(const __grid_constant__ AttentionBackwardParams params,
                       const __grid_constant__ BackwardWorkspace workspace,
                       const __grid_constant__ TileSchedule schedule) {
  using Part = GradQPart<Config>;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& smem = *reinterpret_cast<tile::FloatTile<Config::BLOCK_Q, Config::HEAD_DIM>*>(smem_bytes);
  const WorkTile work = query_tile<Config::BLOCK_Q>(params, schedule, blockIdx.x);
  if (work.num_rows == 0) return;
  const Sequence& s = work.sequence;
  const int64_t row =
      first_padded_index<Config::BLOCK_Q>(params, workspace, s, work.head) + work.first_row;
  const float* first_sum = workspace.grad_q_sum + row * Config::HEAD_DIM + threadIdx.x;
#pragma unroll
  for (int pass = 0; pass < Part::kPasses; ++pass) {
#pragma unroll
    for (int m = 0; m < Part::kM16; ++m) {
      float acc_dq[Part::kSize];
#pragma unroll
      for (int i = 0; i < Part::kSize; ++i) acc_dq[i] = first_sum[Part::offset(m, i)];
      tile::store_accumulator(smem, Part::first_row() + 16 * m, Part::first_col(pass), acc_dq,
                              grad_factor(params));
    }
    first_sum += Part::kSumsOfPass;
  }
  __syncthreads();
  store_grad_q<Config::BLOCK_Q, Config::kNumThreads, Position>(T{}, smem, params, workspace, work);
}

}  // namespace drope::cuda
