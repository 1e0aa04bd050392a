// Hides from each lane the keys outside its range.
#pragma once

#include "cpu/block_range.h"
#include "cpu/softmax.h"

namespace drope::DROPE_ISA {

// The ranges of a tile's lanes relative to the first key of a kv block, as exact small floats.
template <int kVecCount>
struct BlockMask {
  Vec begin[kVecCount], end[kVecCount];

  DROPE_INLINE BlockMask(const TileRange<kVecCount>& range, int64_t block_begin) {
    alignas(64) float lanes[2][kVecCount * kLanes];
    for (int i = 0; i < kVecCount * kLanes; ++i) {
      lanes[0][i] = static_cast<float>(range.lane_begin[i] - static_cast<int32_t>(block_begin));
      lanes[1][i] = static_cast<float>(range.lane_end[i] - static_cast<int32_t>(block_begin));
    }
    for (int v = 0; v < kVecCount; ++v) {
      begin[v] = load(lanes[0] + v * kLanes);
      end[v] = load(lanes[1] + v * kLanes);
    }
  }

  // The scores of key `key` of the block and vector v of the tile, -inf where it is not visible.
  DROPE_INLINE Vec apply(Vec scores, int v, int64_t key) const {
    const Vec k = broadcast(static_cast<float>(key));
    return select(less_equal(begin[v], k) & less(k, end[v]), scores, broadcast(-kInfinity));
  }
};

}  // namespace drope::DROPE_ISA
