// Stages of shared memory that one thread fills and warps of consumers empty, in turn (sm_90).
// Each stage has a barrier that completes when it is full and one that completes when it is empty.
#pragma once

#include <cstdint>

#include "cuda/ptx/fence.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/tile/accumulator.h"

namespace drope::tile {

template <int kStages>
struct StageBarriers {
  uint64_t full[kStages], empty[kStages];

  // By one thread; fence_mbarrier_init and a barrier of the block must follow.
  __device__ __forceinline__ void init(int num_consumer_warps) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], 1);
      ptx::mbarrier_init(&empty[stage], num_consumer_warps);
    }
  }
};

__device__ __forceinline__ void wait_parity(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Where one thread is in the ring. Producer and consumers go round it in step: the parity of a
// stage's phase flips each time round.
template <int kStages>
struct Pipeline {
  StageBarriers<kStages>& barriers;
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit Pipeline(StageBarriers<kStages>& b) : barriers(b) {}

  __device__ __forceinline__ void advance() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (stage == 0) parity ^= 1;
  }

  // Producer. A fresh barrier lets parity 1 pass, so that the first round does not wait.
  __device__ __forceinline__ void wait_empty() { wait_parity(&barriers.empty[stage], parity ^ 1); }
  __device__ __forceinline__ uint64_t* full_barrier() { return &barriers.full[stage]; }

  // Consumers.
  __device__ __forceinline__ void wait_full() { wait_parity(&barriers.full[stage], parity); }

  // Whole warps, when none of their lanes will read the stage again. One arrival a warp, not one a
  // warpgroup: a warp knows only of itself that its wgmma and its loads are done.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (lane_index() == 0) ptx::mbarrier_arrive(&barriers.empty[stage]);
    advance();
  }
};

}  // namespace drope::tile
