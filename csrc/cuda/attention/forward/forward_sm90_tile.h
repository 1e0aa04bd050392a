// A tile of queries and the kv blocks that it passes over. Producer and consumers each work it out
// for themselves, and must come to the same.
#pragma once

#include "cuda/attention/shared/block_range.h"
#include "cuda/attention/shared/work_tile.h"

namespace drope::cuda {

struct ForwardTile : WorkTile {
  int kv_head;
  TileVisibility visible;
  BlockRange kv_blocks;  // passed over from the last to the first
  KeyRange valued_keys;  // those that any query of the sequence sees, and those beyond the tensor,
                         // which TMA makes zeros; the values of others may be anything
};

template <class Config>
__device__ __forceinline__ ForwardTile forward_tile(const AttentionForwardParams& params,
                                                    const TileSchedule& schedule,
                                                    const TilePlace& place) {
  constexpr int kNoEnd = 0x7fffffff;
  const WorkTile work = query_tile<Config::BLOCK_Q>(params, place);
  const Sequence& s = work.sequence;
  const int kv_head = static_cast<int>(static_cast<uint32_t>(work.head) / schedule.group);
  const Visibility visible(params.mask, s);
  KeyRange valued_keys = visible.keys_of_rows(0, s.seqlen_q);
  if (s.first_k + valued_keys.end == params.seqlen_kv) valued_keys.end = kNoEnd;
  const TileVisibility seen(visible, work.first_row, work.num_rows);
  return {work, kv_head, seen, seen.kv_blocks<Config::BLOCK_KV>(work.num_rows), valued_keys};
}

}  // namespace drope::cuda
