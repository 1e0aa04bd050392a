// k' = R k for every key of a call: read once, rotated in float32, rounded once.
#pragma once

#include "cuda/attention/shared/head_rows.h"
#include "cuda/attention/shared/rotary.h"
#include "cuda/attention/shared/work_tile.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/tile/copy_rows.h"

namespace drope::cuda {

// A tile of 64 keys is 8 to 32 KiB; several blocks an SM keep memory busy while others rotate.
template <int kHeadDim>
struct PrepareConfig {
  static constexpr int BLOCK_KV = 64, kNumThreads = 128;
  using Smem = tile::SmemTile<BLOCK_KV, kHeadDim>;
};

// k_prepared: (batch, num_heads_kv, seqlen_kv, head_dim) contiguous.
template <class Config, class T>
__global__ void __launch_bounds__(Config::kNumThreads)
    prepare_keys_kernel(const __grid_constant__ AttentionParams params,
                        const __grid_constant__ TileSchedule schedule, uint16_t* k_prepared) {
  constexpr int kNumThreads = Config::kNumThreads;
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& k_smem = *reinterpret_cast<typename Config::Smem*>(smem_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int head_dim = static_cast<int>(params.head_dim);

  const WorkTile work = key_tile<Config::BLOCK_KV>(params, schedule, blockIdx.x);
  if (work.num_rows == 0) return;
  const Sequence& s = work.sequence;
  const tile::RowWindow k = key_rows(params, s, work.head).window(0, s.seqlen_kv);
  tile::copy_rows_async<kNumThreads>(k_smem, k, work.first_row, head_dim);
  ptx::cp_async_commit_group();
  tile::wait_for_copies();

  rotate_rows<kNumThreads>(T{}, k_smem, Rotation(params.rotary, work.head, 1.0f),
                           key_positions(params, s), work.first_row, work.num_rows, thread);
  __syncthreads();
  const int64_t first = first_key_index(params, s, work.head) + work.first_row;
  const TargetRows to{k_prepared + first * params.head_dim, params.head_dim};
  tile::store_rows<kNumThreads>(
      k_smem, [&](int row) { return to.at(row); }, work.num_rows, head_dim, thread);
}

}  // namespace drope::cuda
