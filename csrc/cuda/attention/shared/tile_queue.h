// Persistent blocks and the tiles they work on. A block begins with the tile of its own index and
// then takes the next one that nobody has taken. Its producer looks for it while the consumers are
// busy with the tile before, and tells them where it is through shared memory.
#pragma once

#include <cstdint>

#include "cuda/attention/shared/work_tile.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/warp_search.h"

namespace drope::cuda {

struct TileQueue {
  TileSchedule schedule;
  // (1) tiles taken beyond the first ones, 0 before the launch; null: a block's next tile is
  // gridDim.x further.
  int32_t* num_taken;
};

struct NextTile {
  tile::StageBarriers<1> barriers;
  TilePlace place;  // sequence -1: there are no more
};

// The producer's end; all lanes of its warp call.
template <int BLOCK_Q>
struct TileFinder {
  const AttentionParams& params;
  const TileQueue& queue;
  NextTile& next;
  tile::Pipeline<1> pipeline;
  int index;

  __device__ __forceinline__ TileFinder(const AttentionParams& p, const TileQueue& q, NextTile& n)
      : params(p), queue(q), next(n), pipeline(n.barriers) {}

  __device__ __forceinline__ TilePlace first() { return publish_from(blockIdx.x); }
  __device__ __forceinline__ TilePlace following() { return publish_from(take_index()); }

 private:
  __device__ __forceinline__ int take_index() const {
    const int num_blocks = static_cast<int>(gridDim.x);
    if (queue.num_taken == nullptr) return index + num_blocks;
    int taken = 0;
    if (tile::lane_index() == 0) taken = num_blocks + atomicAdd(queue.num_taken, 1);
    return tile::from_lane(taken, 0);
  }

  // Tiles without rows are passed over.
  __device__ __forceinline__ TilePlace publish_from(int from) {
    TilePlace place{-1, 0, 0};
    for (index = from; index < static_cast<int>(queue.schedule.num_tiles); index = take_index()) {
      place = query_place<BLOCK_Q>(params, queue.schedule, index);
      if (place.sequence >= 0) break;
    }
    if (tile::lane_index() == 0) {  // alone: a lane that came late would wait for a phase long past
      pipeline.wait_empty();
      next.place = place;
      ptx::mbarrier_arrive(pipeline.full_barrier());
    }
    pipeline.advance();
    return place;
  }
};

// The consumers' end.
struct TileReceiver {
  NextTile& next;
  tile::Pipeline<1> pipeline;

  __device__ __forceinline__ explicit TileReceiver(NextTile& n) : next(n), pipeline(n.barriers) {}

  __device__ __forceinline__ TilePlace wait() {
    pipeline.wait_full();
    const TilePlace place = next.place;
    pipeline.release();
    return place;
  }
};

}  // namespace drope::cuda
