// Which keys a query sees, and what that leaves of the loop over kv blocks (or, backward, over q
// blocks). Every mask of a call is an interval of keys per query, and both ends of it never
// decrease from one query to the next.
#pragma once

#include "cuda/attention/shared/sequence.h"

namespace drope::cuda {

struct KeyRange {
  int begin, end;
  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

// Blocks [begin, end) of a loop; those in [full_begin, full_end) need no mask.
struct BlockRange {
  int begin, end;
  int full_begin, full_end;
  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ bool needs_mask(int block) const {
    return block < full_begin || block >= full_end;
  }
};

// The kv blocks of a tile of queries, of which the first sees `low` and the last `high`.
template <int BLOCK_KV>
__device__ __forceinline__ BlockRange block_range(const KeyRange& low, const KeyRange& high) {
  if (low.begin >= high.end) return {0, 0, 0, 0};
  BlockRange range;
  range.begin = low.begin / BLOCK_KV;
  range.end = (high.end + BLOCK_KV - 1) / BLOCK_KV;
  range.full_begin = (high.begin + BLOCK_KV - 1) / BLOCK_KV;
  range.full_end = low.end / BLOCK_KV;
  return range;
}

struct Visibility {
  int64_t q_start;
  int64_t behind = kUnlimited, ahead = kUnlimited;  // of the key at the query's own index
  int kv_begin, kv_end;
  int seqlen_q;

  __device__ __forceinline__ Visibility(const MaskParams& mask, const Sequence& s)
      : q_start(s.q_start), kv_begin(s.kv_begin), kv_end(s.kv_end), seqlen_q(s.seqlen_q) {
    if (mask.window > 0) behind = mask.window - 1;
    if (mask.causal) {
      ahead = 1;
    } else if (mask.window > 0) {
      ahead = mask.window;
    }
  }

  __device__ __forceinline__ KeyRange keys_of(int64_t query) const {
    const int64_t index = q_start + query;
    return {clamp_to_int(index - behind, kv_begin, kv_end),
            clamp_to_int(index + ahead, kv_begin, kv_end)};
  }

  // The keys that any of queries [first, first + num_queries) sees; num_queries > 0.
  __device__ __forceinline__ KeyRange keys_of_rows(int first, int num_queries) const {
    return {keys_of(first).begin, keys_of(first + num_queries - 1).end};
  }

  // The queries of the sequence that see a key, and those that see any key of it: another interval,
  // whose ends never decrease from one key to the next.
  __device__ __forceinline__ RowRange queries_of(int64_t key) const {
    if (key < kv_begin || key >= kv_end) return {0, 0};
    return {clamp_to_int(key - ahead + 1 - q_start, 0, seqlen_q),
            clamp_to_int(key + behind + 1 - q_start, 0, seqlen_q)};
  }
  __device__ __forceinline__ RowRange seeing_queries() const {
    if (kv_begin >= kv_end) return {0, 0};
    return {queries_of(kv_begin).begin, queries_of(kv_end - 1).end};
  }

  // The kv blocks that queries [first, first + num_queries) of the sequence see.
  template <int BLOCK_KV>
  __device__ __forceinline__ BlockRange kv_blocks(int first, int num_queries) const {
    const int last = min(first + num_queries, seqlen_q) - 1;
    if (first > last || kv_begin >= kv_end) return {0, 0, 0, 0};
    const KeyRange low = keys_of(first), high = keys_of(last);
    return block_range<BLOCK_KV>(low, high);
  }

  // The q blocks that see any of keys [first, first + num_keys).
  template <int BLOCK_Q>
  __device__ __forceinline__ BlockRange q_blocks(int first, int num_keys) const {
    const int64_t begin_key = max(first, kv_begin);
    const int64_t last_key = min(first + num_keys, kv_end) - 1;
    if (begin_key > last_key || seqlen_q == 0) return {0, 0, 0, 0};
    // Query i sees key j iff j - ahead < q_start + i <= j + behind.
    const RowRange any{clamp_to_int(begin_key - ahead + 1 - q_start, 0, seqlen_q),
                       clamp_to_int(last_key + behind + 1 - q_start, 0, seqlen_q)};
    if (any.begin >= any.end) return {0, 0, 0, 0};
    const int64_t all_begin = last_key - ahead + 1 - q_start,
                  all_end = begin_key + behind - q_start;
    const bool all_keys = first >= kv_begin && first + num_keys <= kv_end;
    BlockRange range;
    range.begin = any.begin / BLOCK_Q;
    range.end = (any.end + BLOCK_Q - 1) / BLOCK_Q;
    // A ragged last block counts as full only if its missing rows would see everything too: they
    // are not there, and the caller ignores them.
    range.full_begin = (clamp_to_int(all_begin, 0, seqlen_q) + BLOCK_Q - 1) / BLOCK_Q;
    range.full_end = clamp_to_int(all_end + 1, 0, INT32_MAX) / BLOCK_Q;
    if (!all_keys) range.full_end = range.full_begin = 0;
    return range;
  }
};

// The visibility of the queries of one tile in 32-bit numbers, few enough to stay in registers.
struct TileVisibility {
  int first_begin, first_end;  // what query 0 of the tile would see of an endless row of keys
  KeyRange keys;               // that any query of the tile sees

  // num_queries > 0
  __device__ __forceinline__ TileVisibility(const Visibility& visible, int first, int num_queries)
      : first_begin(clamp_to_int(visible.q_start + first - visible.behind, -kFar, kFar)),
        first_end(clamp_to_int(visible.q_start + first + visible.ahead, -kFar, kFar)),
        keys{min(max(first_begin, visible.kv_begin), visible.kv_end),
             min(max(first_end + num_queries - 1, visible.kv_begin), visible.kv_end)} {}

  __device__ __forceinline__ KeyRange keys_of(int row) const {
    return {min(max(first_begin + row, keys.begin), keys.end),
            min(max(first_end + row, keys.begin), keys.end)};
  }

  template <int BLOCK_KV>
  __device__ __forceinline__ BlockRange kv_blocks(int num_queries) const {
    return block_range<BLOCK_KV>(keys_of(0), keys_of(num_queries - 1));
  }

 private:
  static constexpr int64_t kFar = int64_t{1}
                                  << 30;  // no index of a key, with room for a tile's rows
};

}  // namespace drope::cuda
