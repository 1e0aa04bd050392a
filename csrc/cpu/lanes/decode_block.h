// One block of cached keys for the few queries that share a kv head. Lanes are channels: rows of
// the cache are read as they lie, once for all of these queries.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/lanes/attend.h"
#include "cpu/lanes/dot.h"

namespace drope::DROPE_ISA {

inline constexpr int64_t kDecodeKeys = 64;  // of a block, at most
inline constexpr int64_t kKeyGroup = 16;    // all queries see so many before the next, in L1
// Accumulators of v, of 32 or of 16 registers.
inline constexpr int kDecodeVecs = kLanes >= 16 ? 16 : 8;

template <class Element>
using Row = const typename Element::Storage*;

// Where the rows of a block lie. Past the last key k repeats it, and v has one row of zeros, which
// words across two rows may need.
template <class Element>
struct BlockRows {
  int64_t begin = 0, count = 0;  // keys
  Row<Element> k[kDecodeKeys], v[kDecodeKeys + 1];
};

// One query on its way through the keys. Lanes are keys: those of row_max agree, those of row_sum
// add.
struct QueryState {
  Softmax<1> softmax;
  KeyRange visible;
  float row_scale;  // what acc_o is multiplied by before more is added
};

// The queries of one kv head, (head of the group, row), and what becomes of them.
struct GroupTile {
  int64_t num_queries;
  int64_t dim, dim_v;          // channels of k and of v
  int64_t stride_q, stride_o;  // floats
  float* q;                    // (query, words along head_dim), whole vectors
  float* s;                    // (query, kDecodeKeys) scores, then probabilities as words
  float* acc_o;                // (query, head_dim_v), whole groups of channels of a Dot
  QueryState* state;           // (query)
};

// Rows that are read next. They are asked for in the order in which they lie in memory and a few
// cache lines at a time: memory answers other orders, and bursts, more slowly.
template <class Element>
class LookAhead {
 public:
  LookAhead(const Row<Element>* rows, int64_t count, int64_t dim)
      : row_(rows), end_(rows + count), dim_(dim) {}

  // As many cache lines as kVecCount vectors of words have.
  template <int kVecCount>
  DROPE_INLINE void ask() {
    if (row_ == end_) return;
#pragma GCC unroll 8
    for (int i = 0; i < kVecCount; ++i) __builtin_prefetch(*row_ + channel_ + i * kLine);
    channel_ += kVecCount * kLine;
    while (channel_ >= dim_) {
      channel_ -= dim_;
      if (++row_ == end_) return;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(typename Element::Storage);

  const Row<Element>* row_;
  const Row<Element>* end_;
  int64_t dim_, channel_ = 0;
};

// Scores of kQueryCount queries and kLanes / kQueryCount keys from `key` on, few rows at a time.
template <class Element, class Dot, int kQueryCount>
DROPE_INLINE void score_keys_of(const GroupTile& tile, const BlockRows<Element>& rows,
                                LookAhead<Element>& ahead, int64_t query, int64_t key) {
  constexpr int kKeyCount = kLanes / kQueryCount;
  // Rows share words of q. One query alone loads so few that reading in the order of memory gains
  // more: of float32, which memory bounds, row by row; of 16 bits two rows at a time.
  constexpr int kRowCount =
      kQueryCount == 1 ? 4 / sizeof(typename Element::Storage) : std::min(kKeyCount, 4);
  constexpr int kStep = kLanes * Dot::kDepth;
  const float* const q = tile.q + query * tile.stride_q;
  Vec acc_s[kLanes];  // (query, key)
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc_s[i] = zero();
#pragma GCC unroll 16
  for (int first = 0; first < kKeyCount; first += kRowCount) {
    const auto multiply_add = [&](int64_t channel, int count) {
      ahead.template ask<kRowCount>();
      Vec k_words[kRowCount];
#pragma GCC unroll 16
      for (int i = 0; i < kRowCount; ++i) {
        k_words[i] = Dot::template load_along<Element>(rows.k[key + first + i] + channel, count);
      }
#pragma GCC unroll 4
      for (int g = 0; g < kQueryCount; ++g) {
        const Vec q_words = load(q + g * tile.stride_q + channel / Dot::kDepth);
#pragma GCC unroll 16
        for (int i = 0; i < kRowCount; ++i) {
          Vec& acc = acc_s[g * kKeyCount + first + i];
          acc = Dot::multiply_add(k_words[i], q_words, acc);
        }
      }
    };
    int64_t channel = 0;
    for (; channel + kStep <= tile.dim; channel += kStep) multiply_add(channel, kStep);
    if (channel < tile.dim) multiply_add(channel, static_cast<int>(tile.dim - channel));
  }
  alignas(64) float sums[kLanes];
  store(sums, sum_each(acc_s));
#pragma GCC unroll 4
  for (int g = 0; g < kQueryCount; ++g) {
    std::memcpy(tile.s + (query + g) * kDecodeKeys + key, sums + g * kKeyCount,
                kKeyCount * sizeof(float));
  }
}

// Scores of queries [query, query + kQueryCount) and kKeyGroup keys from `key` on.
template <class Element, class Dot, int kQueryCount>
DROPE_INLINE void score_group(const GroupTile& tile, const BlockRows<Element>& rows,
                              LookAhead<Element>& ahead, int64_t query, int64_t key) {
  for (int64_t i = key; i < key + kKeyGroup; i += kLanes / kQueryCount) {
    score_keys_of<Element, Dot, kQueryCount>(tile, rows, ahead, query, i);
  }
}

// Calls step(query, number of them as a constant) until all queries had their turn.
template <class Step>
DROPE_INLINE void for_queries(int64_t num_queries, const Step& step) {
  int64_t query = 0;
  for (; query + 4 <= num_queries; query += 4) step(query, std::integral_constant<int, 4>{});
  if (num_queries - query >= 2) {
    step(query, std::integral_constant<int, 2>{});
    query += 2;
  }
  if (query < num_queries) step(query, std::integral_constant<int, 1>{});
}

// Hides the keys outside `visible` from one query; keys count from the block's first.
DROPE_INLINE void mask_row(KeyRange visible, int64_t num_vecs, float* s) {
  static constexpr float kLaneIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec begin = broadcast(static_cast<float>(visible.begin));
  const Vec end = broadcast(static_cast<float>(visible.end));
  for (int64_t v = 0; v < num_vecs; ++v) {
    const Vec key = load(kLaneIndex) + broadcast(static_cast<float>(v * kLanes));
    const Vec scores = load(s + v * kLanes);
    store(s + v * kLanes,
          select(less_equal(begin, key) & less(key, end), scores, broadcast(-kInfinity)));
  }
}

// Scores of one query become probabilities in words of Dot.
template <class Dot>
DROPE_INLINE void softmax_row(QueryState& state, float softcap, int64_t num_vecs, float* s) {
  Softmax<1>& softmax = state.softmax;
  Vec max_s[1] = {broadcast(-kInfinity)};
  if (softcap > 0.0f) {
    cap_scores<1>({num_vecs}, softmax.scale, softcap, s, {max_s[0]}, max_s);
  } else {
    for (int64_t v = 0; v < num_vecs; ++v) max_s[0] = max(max_s[0], load(s + v * kLanes));
  }
  const Vec earlier_max = softmax.row_max[0];
  softmax.row_max[0] = max(earlier_max, broadcast(max_lanes(max_s[0])));
  Vec row_scale;
  const Vec reference = softmax.rebase(0, earlier_max, row_scale);
  Vec sum = zero();
  for (int64_t v = 0; v < num_vecs; ++v) {
    const Vec t = load(s + v * kLanes);
    const Vec p = probability<Dot>(exponent(t, reference, softmax.scale_log2[0], zero()));
    sum = sum + p;
    Dot::store_elements(s, v * kLanes, p);
  }
  softmax.row_sum[0] = fma(softmax.row_sum[0], row_scale, sum);
  alignas(64) float scales[kLanes];
  store(scales, row_scale);
  state.row_scale = scales[0];
}

// acc_o += p^T v for kQueryCount queries, words [begin, end) of p, and kGroupCount groups of
// channels from `channel` on, the last of which may have fewer: `count` channels.
template <class Element, class Dot, int kQueryCount, int kGroupCount>
DROPE_INLINE void accumulate_groups(const GroupTile& tile, const BlockRows<Element>& rows,
                                    LookAhead<Element>& ahead, int64_t query, KeyRange words,
                                    int64_t channel, int count) {
  constexpr int kVecCount = kGroupCount * Dot::kDepth;
  float* const acc_o = tile.acc_o + query * tile.stride_o + channel;
  const float* const p = tile.s + query * kDecodeKeys;
  Vec acc[kQueryCount][kVecCount];
#pragma GCC unroll 4
  for (int q = 0; q < kQueryCount; ++q) {
    const Vec row_scale = broadcast(tile.state[query + q].row_scale);
#pragma GCC unroll 16
    for (int v = 0; v < kVecCount; ++v) {
      acc[q][v] = load(acc_o + q * tile.stride_o + v * kLanes) * row_scale;
    }
  }
  for (int64_t w = words.begin; w < words.end; ++w) {
    Vec v_words[kVecCount];
#pragma GCC unroll 8
    for (int g = 0; g < kGroupCount; ++g) {
      ahead.template ask<Dot::kDepth>();
      Dot::template load_across<Element>(rows.v + w * Dot::kDepth,
                                         channel + g * kLanes * Dot::kDepth, count,
                                         v_words + g * Dot::kDepth);
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQueryCount; ++q) {
      const Vec p_word = broadcast(p[q * kDecodeKeys + w]);
#pragma GCC unroll 16
      for (int v = 0; v < kVecCount; ++v) {
        acc[q][v] = Dot::multiply_add(p_word, v_words[v], acc[q][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueryCount; ++q) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecCount; ++v) store(acc_o + q * tile.stride_o + v * kLanes, acc[q][v]);
  }
}

// accumulate_groups for all channels from `channel` on.
template <class Element, class Dot, int kQueryCount, int kGroupCount>
DROPE_INLINE void accumulate_channels(const GroupTile& tile, const BlockRows<Element>& rows,
                                      LookAhead<Element>& ahead, int64_t query, KeyRange words,
                                      int64_t channel) {
  constexpr int kGroup = kLanes * Dot::kDepth;
  for (; channel + kGroupCount * kGroup <= tile.dim_v; channel += kGroupCount * kGroup) {
    accumulate_groups<Element, Dot, kQueryCount, kGroupCount>(tile, rows, ahead, query, words,
                                                              channel, kGroup);
  }
  if constexpr (kGroupCount > 1) {
    accumulate_channels<Element, Dot, kQueryCount, kGroupCount / 2>(tile, rows, ahead, query, words,
                                                                    channel);
  } else if (channel < tile.dim_v) {
    accumulate_groups<Element, Dot, kQueryCount, 1>(tile, rows, ahead, query, words, channel,
                                                    static_cast<int>(tile.dim_v - channel));
  }
}

// Scores, mask, softmax update, accumulation. While k is read v is asked for, while v is read the
// k that comes next: memory never waits for arithmetic.
template <class Element, class Dot>
void attend_block(const GroupTile& tile, const BlockRows<Element>& rows, float softcap,
                  LookAhead<Element>& ahead_v, LookAhead<Element>& ahead_k) {
  const int64_t num_vecs = (rows.count + kLanes - 1) / kLanes;
  LookAhead<Element> nothing(nullptr, 0, 1);
  for (int64_t key = 0; key < rows.count; key += kKeyGroup) {
    for_queries(tile.num_queries, [&](int64_t query, auto count) {
      score_group<Element, Dot, count()>(tile, rows, query == 0 ? ahead_v : nothing, query, key);
    });
  }
  for (int64_t query = 0; query < tile.num_queries; ++query) {
    float* s = tile.s + query * kDecodeKeys;
    QueryState& state = tile.state[query];
    const KeyRange visible{state.visible.begin - rows.begin,
                           std::min(state.visible.end - rows.begin, rows.count)};
    if (visible.begin > 0 || visible.end < num_vecs * kLanes) mask_row(visible, num_vecs, s);
    softmax_row<Dot>(state, softcap, num_vecs, s);
  }
  for (int64_t key = 0; key < rows.count; key += kKeyGroup) {
    const int64_t end = std::min(key + kKeyGroup, rows.count);
    const KeyRange words{key / Dot::kDepth, (end + Dot::kDepth - 1) / Dot::kDepth};
    for_queries(tile.num_queries, [&](int64_t query, auto count) {
      constexpr int kGroups = std::min(kDecodeVecs / count(), 8) / Dot::kDepth;
      accumulate_channels<Element, Dot, count(), kGroups>(
          tile, rows, query == 0 ? ahead_k : nothing, query, words, 0);
    });
    for (int64_t query = 0; query < tile.num_queries; ++query) tile.state[query].row_scale = 1.0f;
  }
}

}  // namespace drope::DROPE_ISA
