// Which keys a query sees, and what that leaves of the kv loop of a tile of queries.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

inline constexpr int64_t kBlockKv = 128;  // p of a block, 24 KiB at 48 queries, stays near L1

struct KeyRange {
  int64_t begin, end;
  DROPE_INLINE bool empty() const { return begin >= end; }
};

// The key index of query 0.
DROPE_INLINE int64_t query_start(const MaskParams& mask, int64_t batch) {
  return mask.q_start != nullptr ? mask.q_start[batch] : mask.q_offset;
}

// The keys that kv_start and kv_end leave to a batch row.
DROPE_INLINE KeyRange valid_keys(const AttentionParams& p, int64_t batch) {
  const MaskParams& mask = p.mask;
  const int64_t begin = mask.kv_start != nullptr ? mask.kv_start[batch] : 0;
  const int64_t end = mask.kv_end != nullptr ? mask.kv_end[batch] : p.seqlen_kv;
  return {std::clamp<int64_t>(begin, 0, p.seqlen_kv), std::clamp<int64_t>(end, 0, p.seqlen_kv)};
}

// The keys that each query of a batch row sees. Every mask of an attention call is an interval of
// keys per query, and both of its ends never decrease from one query to the next.
class VisibleKeys {
 public:
  DROPE_INLINE VisibleKeys(const AttentionParams& p, int64_t batch)
      : valid_(valid_keys(p, batch)), q_start_(query_start(p.mask, batch)) {
    const int64_t window = p.mask.window;
    if (window > 0) behind_ = window - 1;
    if (p.mask.causal) {
      ahead_ = 1;
    } else if (window > 0) {
      ahead_ = window;
    }
  }

  DROPE_INLINE KeyRange of_query(int64_t query) const {
    const int64_t index = q_start_ + query;
    return {std::max(valid_.begin, index - behind_), std::min(valid_.end, index + ahead_)};
  }

 private:
  static constexpr int64_t kUnlimited = int64_t{1} << 40;

  KeyRange valid_;
  int64_t q_start_;
  int64_t behind_ = kUnlimited, ahead_ = kUnlimited;  // of the key at the query's own index
};

// The keys that any query of a batch row sees; {0, 0} if there are none.
DROPE_INLINE KeyRange visible_to_any(const AttentionParams& p, int64_t batch) {
  if (p.seqlen_q == 0) return {0, 0};
  const VisibleKeys visible(p, batch);
  const KeyRange keys{visible.of_query(0).begin, visible.of_query(p.seqlen_q - 1).end};
  return keys.empty() ? KeyRange{0, 0} : keys;
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
    const VisibleKeys visible(p, batch);
    any = {INT64_MAX, 0};
    all = {0, INT64_MAX};
    int64_t end = 0;
    for (int v = 0; v < kVecCount; ++v) {
      for (int i = v * kLanes; i < (v + 1) * kLanes; ++i) {
        // Lanes past the last query repeat it; what they compute is not stored.
        KeyRange keys = visible.of_query(std::min(first_query + i, p.seqlen_q - 1));
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

  // From the first lane that sees a key to the last.
  KeyRange seeing_lanes() const {
    KeyRange lanes{0, 0};
    for (int i = 0; i < kQueries; ++i) {
      if (lane_begin[i] >= lane_end[i]) continue;
      lanes = {lanes.empty() ? i : lanes.begin, i + 1};
    }
    return lanes;
  }
};

}  // namespace drope::DROPE_ISA
