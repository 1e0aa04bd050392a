// Which keys a query sees, and what that leaves of the kv loop of a tile of queries.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/inline.h"

namespace drope::DROPE_ISA {

inline constexpr int64_t kBlockKv = 128;  // p of a block, 24 KiB at 48 queries, stays near L1

struct KeyRange {
  int64_t begin, end;
  DROPE_INLINE bool empty() const { return begin >= end; }
};

// The keys that kv_start and kv_end leave to a batch row.
DROPE_INLINE KeyRange valid_keys(const AttentionParams& p, int64_t batch) {
  const MaskParams& mask = p.mask;
  const int64_t begin = mask.kv_start != nullptr ? mask.kv_start[batch] : 0;
  const int64_t end = mask.kv_end != nullptr ? mask.kv_end[batch] : p.seqlen_kv;
  return {std::clamp<int64_t>(begin, 0, p.seqlen_kv), std::clamp<int64_t>(end, 0, p.seqlen_kv)};
}

// Every mask of an attention call is an interval of keys per query, and both of its ends never
// decrease from one query to the next.
DROPE_INLINE KeyRange visible_keys(const AttentionParams& p, int64_t batch, int64_t query) {
  const MaskParams& mask = p.mask;
  const int64_t index = mask.q_start[batch] + query;
  KeyRange keys = valid_keys(p, batch);
  if (mask.window > 0) keys.begin = std::max(keys.begin, index - mask.window + 1);
  if (mask.causal) {
    keys.end = std::min(keys.end, index + 1);
  } else if (mask.window > 0) {
    keys.end = std::min(keys.end, index + mask.window);
  }
  return keys;
}

// The keys that any query of a batch row sees.
DROPE_INLINE KeyRange visible_to_any(const AttentionParams& p, int64_t batch) {
  if (p.seqlen_q == 0) return {0, 0};
  return {visible_keys(p, batch, 0).begin, visible_keys(p, batch, p.seqlen_q - 1).end};
}

// The kv loop of kVecCount * kLanes queries, in keys counted from `origin`.
template <int kVecCount>
struct TileRange {
  static constexpr int kQueries = kVecCount * kLanes;
  int32_t lane_begin[kQueries], lane_end[kQueries];  // keys that each lane sees
  KeyRange any;                                      // that some lane sees
  KeyRange all;                                      // that every lane sees: no mask needed
  int64_t vec_end[kVecCount];  // lanes of vectors 0 .. v see nothing from here on; ascending

  TileRange() = default;
  TileRange(const AttentionParams& p, int64_t batch, int64_t first_query, int64_t origin) {
    any = {INT64_MAX, 0};
    all = {0, INT64_MAX};
    int64_t end = 0;
    for (int v = 0; v < kVecCount; ++v) {
      for (int i = v * kLanes; i < (v + 1) * kLanes; ++i) {
        // Lanes past the last query repeat it; what they compute is not stored.
        KeyRange keys = visible_keys(p, batch, std::min(first_query + i, p.seqlen_q - 1));
        keys = keys.empty() ? KeyRange{0, 0} : KeyRange{keys.begin - origin, keys.end - origin};
        lane_begin[i] = static_cast<int32_t>(keys.begin);
        lane_end[i] = static_cast<int32_t>(keys.end);
        all = {std::max(all.begin, keys.begin), std::min(all.end, keys.end)};
        if (!keys.empty()) any.begin = std::min(any.begin, keys.begin);
        end = std::max(end, keys.end);
      }
      vec_end[v] = end;
    }
    any = {std::min(any.begin, end), end};
  }
};

}  // namespace drope::DROPE_ISA
