// The sizes of the sm_90a forward kernel and what follows from them.
//
//   HEAD_DIM  BLOCK_Q x BLOCK_KV  consumers  stages  registers  shared memory  cycles of a kv block
//         64           192 x 128          3       4  128 / 160        176 KiB  mma 1536, exp2 1536
//        128           128 x 128          2       2  160 / 232        192 KiB  mma 2048, exp2 1024
//
// registers: of acc_s, p_frag and acc_o / of a consumer's thread, which also holds the softmax's
// state and addresses. A block takes all registers of its SM, so one runs at a time, and BLOCK_Q is
// as large as they allow: the larger it is, the fewer times keys and values come from L2.
// cycles: 4096 FLOP and 16 exp2 each (data sheet; not measured). Two stages are 3000 to 4000 cycles
// ahead of the consumers, a copy from L2 takes some 500.
#pragma once

#include <cstdint>

#include "cuda/attention/shared/tile_queue.h"
#include "cuda/tensor_map.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/smem_tile.h"
#include "cuda/tile/wgmma.h"

namespace drope::cuda {

template <int HEAD_DIM>
struct ForwardSm90Sizes;

template <>
struct ForwardSm90Sizes<64> {
  static constexpr int BLOCK_KV = 128, kNumConsumers = 3, kStages = 4;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
};

template <>
struct ForwardSm90Sizes<128> {
  static constexpr int BLOCK_KV = 128, kNumConsumers = 2, kStages = 2;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

// Every buffer of a block. Tiles come first: they are aligned to 1024 bytes.
template <class Config>
struct ForwardSm90Smem {
  using QTile = tile::SmemTile<tile::kWarpgroupRows, Config::HEAD_DIM>;
  using KvTile = tile::SmemTile<Config::BLOCK_KV, Config::HEAD_DIM>;
  using WarpTile = tile::SmemTile<16, Config::HEAD_DIM>;
  QTile q[Config::kNumConsumers];
  KvTile k[Config::kStages], v[Config::kStages];
  WarpTile out[Config::kNumConsumerWarps];
  tile::StageBarriers<1> q_barriers;
  tile::StageBarriers<Config::kStages> k_barriers, v_barriers;
  NextTile next_tile;
};

// How TMA sees the tensors; a box is a slab of one tile of shared memory.
struct ForwardSm90Maps {
  HeadTensorMap q, k, v;
};

template <int HEAD_DIM_>
struct ForwardSm90Config : ForwardSm90Sizes<HEAD_DIM_> {
  using Sizes = ForwardSm90Sizes<HEAD_DIM_>;
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int BLOCK_Q = tile::kWarpgroupRows * Sizes::kNumConsumers;
  static constexpr int kNumConsumerThreads = tile::kWarpgroupThreads * Sizes::kNumConsumers;
  static constexpr int kNumConsumerWarps = kNumConsumerThreads / 32;
  static constexpr int kNumThreads = kNumConsumerThreads + tile::kWarpgroupThreads;
  using Smem = ForwardSm90Smem<ForwardSm90Config>;

  // Named barriers; 0 is __syncthreads.
  static constexpr int kTurnBarrier = 1;  // one for each consumer
  static constexpr int kWarpgroupBarrier = kTurnBarrier + Sizes::kNumConsumers;  // likewise
  static constexpr int kConsumersBarrier = kWarpgroupBarrier + Sizes::kNumConsumers;
  static_assert(kConsumersBarrier < 16);

  // What ptxas must find room for in every thread of a consumer: two float32 accumulators and the
  // probabilities in 16 bits. Some 30 more hold everything else.
  static constexpr int kTileRegisters = Sizes::BLOCK_KV / 2 + HEAD_DIM / 2 + Sizes::BLOCK_KV / 4;
  static_assert(kTileRegisters + 30 <= Sizes::kConsumerRegisters);
  static_assert(tile::kWarpgroupThreads * (Sizes::kProducerRegisters +
                                           Sizes::kNumConsumers * Sizes::kConsumerRegisters) <=
                65536);

  // Instructions in the machine code of one instance: scores and probabilities times v stand in the
  // loop over kv blocks and once before and behind it; copies of k stand before and in the loop.
  static constexpr int kNumHgmma = 2 * (HEAD_DIM / 16 + Sizes::BLOCK_KV / 16);
  static constexpr int kNumUtmaldg = HEAD_DIM / 64 * (2 + 1 + Sizes::kNumConsumers);
};

static_assert(sizeof(ForwardSm90Config<64>::Smem) == (176 + 1) * 1024);
static_assert(sizeof(ForwardSm90Config<128>::Smem) == (192 + 1) * 1024);
static_assert(sizeof(ForwardSm90Config<128>::Smem) <= 227 * 1024);

}  // namespace drope::cuda
