// The unit of work of the forward pass: 32 queries and 64 keys, at the end of their range 32, as
// three stages on tiles.
//
//   score       S^T = K Q^T        a sum tile is 16 keys x 16 queries, lanes are queries
//   exponentiate  P = 2^exponent(S)  two rows of S, keys 2i and 2i + 1, become a row of words
//   accumulate  O^T += V^T P       a sum tile is 16 channels x 16 queries
//
// Products are bound by their own instruction, exponentials by vector ports: they overlap when each
// is issued between the others, so both products call back after every multiply-add.
//
// Rules of the product loops, each measured: four operand tiles stay in registers, the other two
// are loaded for the next row as soon as this row has used them; a sum is stored once the next sum
// has begun, as a tile that is stored at once stalls the registers behind it. K and V stream past
// the L1 cache, which keeps S, P, O.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/softmax.h"
#include "cpu/tiles/pack.h"
#include "cpu/tiles/unroll.h"

namespace drope::DROPE_ISA {

inline constexpr int64_t kItemQueries = 2 * kTileRows;
inline constexpr int64_t kItemKeys = 4 * kTileRows;

// The running softmax of an item's queries.
struct QueryState {
  alignas(64) float reference[kItemQueries];  // of exponents; -inf while a row has seen no key
  alignas(64) float row_sum[kItemQueries];
  alignas(64) float scale_log2[kItemQueries];
};

struct Item {
  const float* q;  // columns (2, steps)
  const float* k;  // rows (4, steps)
  const float* v;  // channels (2, channel tiles)
  float* acc_o;    // (channel tiles, 2)
  QueryState* state;
  int64_t query_tile;  // of the chunk
  int64_t first_key;   // as ranges count keys
  bool half;           // no query sees the second half of the keys: they are left out
  bool masked;         // some query does not see some key
  bool first, last;    // of the items of its queries
};

// Scores of one item (4 key tiles, 2), and of two items P as words: (2 steps of keys, 2).
struct ItemScratch {
  float* scores;
  float *p, *earlier_p;
  static constexpr int64_t kFloats = (8 + 2 * 4) * kTile;
  explicit ItemScratch(float* memory)
      : scores(memory), p(memory + 8 * kTile), earlier_p(memory + 12 * kTile) {}
};

// Where scores of a row count from, finite also for rows that have seen no key.
DROPE_INLINE Vec finite_reference(Vec reference) {
  return select(equal(reference, broadcast(-kInfinity)), zero(), reference);
}

// P may be this much above 1 before the row's reference moves: in bf16 it costs no bit, and moving
// it rescales all of the row's output.
inline constexpr float kHeadroom = 256.0f;

// Scores to probabilities in 32 portions of two keys.
class Exponentiation {
 public:
  static constexpr int kPortions = 32;

  DROPE_INLINE Exponentiation(const Item& item, const float* scores, float* p)
      : state_(*item.state), half_(item.half), scores_(scores), p_(p) {
    for (int c = 0; c < 2; ++c) {
      reference_[c] = finite_reference(load(state_.reference + c * kLanes));
      scale_log2_[c] = load(state_.scale_log2 + c * kLanes);
      block_sum_[c] = zero();
    }
  }

  // Portions [begin, end), as far as the item has them.
  DROPE_INLINE void run(int begin, int end) {
    for (int i = begin; i < end; ++i) {
      if (i >= kPortions / 2 && half_) return;
      const float* s = scores_ + i / 8 * 2 * kTile + i % 8 * 2 * kLanes;
      float* words = p_ + i / 16 * 2 * kTile + i % 16 * kLanes;
      for (int c = 0; c < 2; ++c, s += kTile, words += kTile) {
        const Vec even = probability(load(s), c), odd = probability(load(s + kLanes), c);
        block_sum_[c] = block_sum_[c] + (even + odd);
        store(words, to_words(even, odd));
      }
    }
  }

  // Adds to the row sums unless a row may have outgrown its reference: then false, and P has to be
  // formed again. While all of a block sums to no more than the headroom, no key exceeds it: that
  // needs no maximum of the scores.
  DROPE_INLINE bool finish() {
    const Vec headroom = broadcast(kHeadroom);
    if (any(less(headroom, block_sum_[0])) || any(less(headroom, block_sum_[1]))) return false;
    for (int c = 0; c < 2; ++c) {
      float* row_sum = state_.row_sum + c * kLanes;
      store(row_sum, load(row_sum) + block_sum_[c]);
    }
    return true;
  }

 private:
  DROPE_INLINE Vec probability(Vec t, int c) const {
    return exp2_for_bf16(exponent(t, reference_[c], scale_log2_[c], zero()));
  }

  QueryState& state_;
  const bool half_;
  const float* scores_;
  float* p_;
  Vec reference_[2], scale_log2_[2], block_sum_[2];
};

// The stages for head dimensions up to kDim. What a product leaves in a register, or has loaded
// there for the next one, is of the object; registers are free between calls but for that.
template <int kDim>
class ItemStages {
 public:
  static constexpr int kSteps = kDim / kStep;
  static constexpr int kChannelTiles = kDim / kLanes;
  // With two steps Q fits in four registers. Else sums do, two key tiles of them.
  static constexpr bool kKeepsQueries = kSteps == 2;
  static constexpr int kScoreSlots = kKeepsQueries ? 16 : 8 * kSteps;  // calls of `between`
  static constexpr int kAccumulateSlots = 4 * kChannelTiles;

  DROPE_INLINE explicit ItemStages(const Tiles& tiles) : tiles_(tiles) {}

  // The scores of an item. kChained: `accumulate` was chained to this item. `then`: the item whose
  // P is complete once the last two slots are reached, for the next `accumulate`; may be null.
  template <bool kChained, class Between>
  DROPE_INLINE void score(const Item& item, float* scores, const Item* then, const float* then_p,
                          const Between& between) {
    if constexpr (kKeepsQueries) {
      score_by_query<kChained>(item, scores, then, then_p, between);
    } else {
      score_by_pair<kChained>(item, scores, between);
    }
  }

  // The next `accumulate` loads what it begins with: P in memory has changed.
  DROPE_INLINE void forget_operands() { operands_loaded_ = false; }

  // kChained: loads what `score` of `next` begins with.
  template <bool kChained, class Between>
  DROPE_INLINE void accumulate(const Item& item, const float* p, const Item* next,
                               const Between& between) {
    if (!operands_loaded_) {
      load_p(p);
      load_v(item, 0);
    }
    operands_loaded_ = false;
    unroll<kChannelTiles>([&](auto d) DROPE_INLINE_LAMBDA {
      constexpr bool kLast = d == kChannelTiles - 1;
      constexpr bool kLoadsQueries = kLast && kChained && kKeepsQueries;
      float* acc_o = item.acc_o + d * 2 * kTile;
      start_sum<6>(item, acc_o);
      tiles_.template multiply_add<6, 4, 0>();
      if constexpr (kLoadsQueries) tiles_.template load<0>(next->q);
      between(std::integral_constant<int, 4 * d>{});
      if (!item.half) tiles_.template multiply_add<6, 5, 1>();
      if constexpr (kLoadsQueries) tiles_.template load<1>(next->q + kTile);
      between(std::integral_constant<int, 4 * d + 1>{});
      store_pending();
      start_sum<7>(item, acc_o + kTile);
      tiles_.template multiply_add<7, 4, 2>();
      if constexpr (!kLast) {
        tiles_.template load_streaming<4>(item.v + (d + 1) * kTile);
      } else if constexpr (kChained) {
        tiles_.template load_streaming<4>(next->k);
      }
      if constexpr (kLoadsQueries) tiles_.template load<2>(next->q + 2 * kTile);
      between(std::integral_constant<int, 4 * d + 2>{});
      if (!item.half) tiles_.template multiply_add<7, 5, 3>();
      if constexpr (!kLast) {
        tiles_.template load_streaming<5>(item.v + (kChannelTiles + d + 1) * kTile);
      } else if constexpr (kChained) {
        tiles_.template load_streaming<5>(next->k + (kKeepsQueries ? 1 : kSteps) * kTile);
      }
      if constexpr (kLoadsQueries) tiles_.template load<3>(next->q + 3 * kTile);
      between(std::integral_constant<int, 4 * d + 3>{});
      tiles_.template store<6>(acc_o);
      pending_ = acc_o + kTile;
    });
    if (!kChained || !kKeepsQueries) store_pending();
  }

 private:
  template <int kSum>
  DROPE_INLINE void start_sum(const Item& item, const float* acc_o) const {
    if (item.first) {
      tiles_.template zero<kSum>();
    } else {
      tiles_.template load<kSum>(acc_o);
    }
  }

  DROPE_INLINE void store_pending() {
    if (pending_ != nullptr) tiles_.template store<7>(pending_);
    pending_ = nullptr;
  }

  DROPE_INLINE void load_p(const float* p) const {
    tiles_.template load<0>(p);
    tiles_.template load<1>(p + 2 * kTile);
    tiles_.template load<2>(p + kTile);
    tiles_.template load<3>(p + 3 * kTile);
  }

  DROPE_INLINE void load_v(const Item& item, int64_t channel_tile) const {
    tiles_.template load_streaming<4>(item.v + channel_tile * kTile);
    tiles_.template load_streaming<5>(item.v + (kChannelTiles + channel_tile) * kTile);
  }

  // Registers 0 to 3 hold Q: queries 0 to 15 by two steps, queries 16 to 31.
  template <bool kChained, class Between>
  DROPE_INLINE void score_by_query(const Item& item, float* scores, const Item* then,
                                   const float* then_p, const Between& between) {
    if constexpr (!kChained) {
      unroll<4>([&](auto i) DROPE_INLINE_LAMBDA { tiles_.template load<i>(item.q + i * kTile); });
      tiles_.template load_streaming<4>(item.k);
      tiles_.template load_streaming<5>(item.k + kTile);
    }
    operands_loaded_ = then != nullptr && !item.half;
    unroll<4>([&](auto t) DROPE_INLINE_LAMBDA {
      if (t >= 2 && item.half) {
        unroll<4>([&](auto i)
                      DROPE_INLINE_LAMBDA { between(std::integral_constant<int, 4 * t + i>{}); });
        return;
      }
      const bool loads_p = t == 3 && operands_loaded_;
      const float* next_k = item.k + (t + 1) * 2 * kTile;
      tiles_.template zero<6>();
      tiles_.template multiply_add<6, 4, 0>();
      between(std::integral_constant<int, 4 * t>{});
      if (loads_p) tiles_.template load<0>(then_p);
      tiles_.template multiply_add<6, 5, 1>();
      between(std::integral_constant<int, 4 * t + 1>{});
      store_pending();
      if (loads_p) tiles_.template load<1>(then_p + 2 * kTile);
      tiles_.template zero<7>();
      tiles_.template multiply_add<7, 4, 2>();
      if constexpr (t < 3) tiles_.template load_streaming<4>(next_k);
      if (loads_p) {
        tiles_.template load_streaming<4>(then->v);
        tiles_.template load<2>(then_p + kTile);
      }
      between(std::integral_constant<int, 4 * t + 2>{});
      tiles_.template multiply_add<7, 5, 3>();
      if constexpr (t < 3) tiles_.template load_streaming<5>(next_k + kTile);
      if (loads_p) {
        tiles_.template load_streaming<5>(then->v + kChannelTiles * kTile);
        tiles_.template load<3>(then_p + 3 * kTile);
      }
      between(std::integral_constant<int, 4 * t + 3>{});
      tiles_.template store<6>(scores + t * 2 * kTile);
      pending_ = scores + (t * 2 + 1) * kTile;
    });
    store_pending();
  }

  // Registers 0 to 3 hold the sums of two key tiles, by 16 queries; 4 and 5 K, a step ahead.
  template <bool kChained, class Between>
  DROPE_INLINE void score_by_pair(const Item& item, float* scores, const Between& between) {
    if constexpr (!kChained) {
      tiles_.template load_streaming<4>(item.k);
      tiles_.template load_streaming<5>(item.k + kSteps * kTile);
    }
    unroll<2 * kSteps>([&](auto i) DROPE_INLINE_LAMBDA {
      constexpr int kPair = i / kSteps, kStepIndex = i % kSteps;
      if (kPair == 1 && item.half) {
        unroll<4>([&](auto slot) DROPE_INLINE_LAMBDA {
          between(std::integral_constant<int, 4 * i + slot>{});
        });
        return;
      }
      constexpr bool kBegins = kStepIndex == 0, kStores = kBegins && kPair == 1;
      constexpr int kNext = i + 1;  // a step of this pair of key tiles, or the first of the next
      const float* next_k = item.k + (kNext / kSteps * 2 * kSteps + kNext % kSteps) * kTile;
      const float* q = item.q + kStepIndex * kTile;
      tiles_.template load<6>(q);
      begin_pair<0, kBegins, kStores>(scores);
      tiles_.template multiply_add<0, 4, 6>();
      tiles_.template load<7>(q + kSteps * kTile);
      between(std::integral_constant<int, 4 * i>{});
      begin_pair<1, kBegins, kStores>(scores);
      tiles_.template multiply_add<1, 4, 7>();
      if constexpr (kNext < 2 * kSteps) tiles_.template load_streaming<4>(next_k);
      between(std::integral_constant<int, 4 * i + 1>{});
      begin_pair<2, kBegins, kStores>(scores);
      tiles_.template multiply_add<2, 5, 6>();
      between(std::integral_constant<int, 4 * i + 2>{});
      begin_pair<3, kBegins, kStores>(scores);
      tiles_.template multiply_add<3, 5, 7>();
      if constexpr (kNext < 2 * kSteps) tiles_.template load_streaming<5>(next_k + kSteps * kTile);
      between(std::integral_constant<int, 4 * i + 3>{});
    });
    float* last = scores + (item.half ? 0 : 4) * kTile;
    unroll<4>([&](auto i) DROPE_INLINE_LAMBDA { tiles_.template store<i>(last + i * kTile); });
  }

  template <int kSum, bool kBegins, bool kStores>
  DROPE_INLINE void begin_pair(float* scores) const {
    if constexpr (kStores) tiles_.template store<kSum>(scores + kSum * kTile);
    if constexpr (kBegins) tiles_.template zero<kSum>();
  }

  const Tiles& tiles_;
  float* pending_ = nullptr;      // where register 7 belongs
  bool operands_loaded_ = false;  // registers 0 to 5 hold what the next `accumulate` begins with
};

}  // namespace drope::DROPE_ISA
