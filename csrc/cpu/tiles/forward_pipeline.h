// Items one after the other, three in progress: while one is exponentiated, the next one's scores
// and the earlier one's output are computed.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/mask.h"
#include "cpu/tiles/forward_item.h"

namespace drope::DROPE_ISA {

using QueryRange = TileRange<2>;
static_assert(QueryRange::kQueries == kItemQueries, "a range per item");

// `Finish` is called with an item once the output of its queries is complete.
template <int kDim, class Finish>
class Pipeline {
  using Stages = ItemStages<kDim>;

 public:
  DROPE_INLINE Pipeline(const Tiles& tiles, float* memory, const QueryRange* ranges,
                        const Finish& finish)
      : stages_(tiles), scratch_(memory), ranges_(ranges), finish_(finish) {}

  void push(const Item& next) {
    if (has_current_) find_references();
    if (has_earlier_) {
      const bool fits = advance(next);
      finish_earlier();
      if (!fits) {
        has_earlier_ = false;
        stages_.forget_operands();
        score(current_);
        if (current_.masked) hide();
        exponentiate();
        score(next);
      }
    } else {
      if (has_current_) exponentiate();
      score(next);
    }
    shift();
    current_ = next;
    has_current_ = true;
  }

  void drain() {
    if (has_current_) find_references();
    accumulate_earlier();
    if (has_current_) exponentiate();
    shift();
    accumulate_earlier();
    has_current_ = false;
  }

 private:
  void shift() {
    std::swap(scratch_.p, scratch_.earlier_p);
    earlier_ = current_;
    has_earlier_ = has_current_;
  }

  void score(const Item& item) {
    stages_.template score<false>(item, scratch_.scores, nullptr, nullptr, [](auto) {});
  }

  // The three stages of three items, each product with its share of the exponentials. False if
  // those of the current item have to be formed again.
  bool advance(const Item& next) {
    Exponentiation exponentiation(current_, scratch_.scores, scratch_.p);
    constexpr int kHalf = Exponentiation::kPortions / 2;
    stages_.template accumulate<true>(
        earlier_, scratch_.earlier_p, &next, [&](auto slot) DROPE_INLINE_LAMBDA {
          constexpr int kSlots = Stages::kAccumulateSlots;
          exponentiation.run(kHalf * slot / kSlots, kHalf * (slot + 1) / kSlots);
        });
    stages_.template score<true>(
        next, scratch_.scores, &current_, scratch_.p, [&](auto slot) DROPE_INLINE_LAMBDA {
          exponentiation.run(kHalf + score_share(slot), kHalf + score_share(slot + 1));
        });
    return exponentiation.finish();
  }

  // Portions before a slot of `score`. Where the next P is loaded in the last slots it is complete
  // two slots earlier.
  static constexpr int score_share(int slot) {
    constexpr int kHalf = Exponentiation::kPortions / 2, kSlots = Stages::kScoreSlots;
    if (!Stages::kKeepsQueries || slot <= kSlots - 4) return kHalf * slot / kSlots;
    return slot == kSlots - 3 ? kHalf - 2 : kHalf;
  }

  void exponentiate() {
    if (try_to_exponentiate()) return;
    accumulate_earlier();
    rebase();
    try_to_exponentiate();
  }

  bool try_to_exponentiate() {
    Exponentiation exponentiation(current_, scratch_.scores, scratch_.p);
    exponentiation.run(0, Exponentiation::kPortions);
    return exponentiation.finish();
  }

  void accumulate_earlier() {
    if (!has_earlier_) return;
    stages_.template accumulate<false>(earlier_, scratch_.earlier_p, nullptr, [](auto) {});
    finish_earlier();
    has_earlier_ = false;
  }

  void finish_earlier() {
    if (earlier_.last) finish_(earlier_);
  }

  // Hides what is hidden from the current item, and gives rows that see their first keys a
  // reference.
  void find_references() {
    if (current_.masked) hide();
    const float* reference = current_.state->reference;
    const Vec no_key = broadcast(-kInfinity);
    if (any(equal(load(reference), no_key)) || any(equal(load(reference + kLanes), no_key))) {
      for (int c = 0; c < 2; ++c) {
        const Vec before = load(reference + c * kLanes);
        store(current_.state->reference + c * kLanes,
              select(equal(before, no_key), largest_score(c), before));
      }
    }
  }

  int64_t num_keys() const { return current_.half ? kStep : kItemKeys; }

  // Of the current item, of queries 16 c and up.
  Vec largest_score(int c) const {
    const float* s = scratch_.scores + c * kTile;
    Vec largest[4];
    for (int i = 0; i < 4; ++i) largest[i] = load(s + i * kLanes);
    for (int64_t key = 0; key < num_keys(); key += kTileRows, s += 2 * kTile) {
#pragma GCC unroll 16
      for (int64_t row = 0; row < kTileRows; ++row) {
        largest[row % 4] = max(largest[row % 4], load(s + row * kLanes));
      }
    }
    return max(max(largest[0], largest[1]), max(largest[2], largest[3]));
  }

  // Moves the references of the current item's rows to their largest scores.
  void rebase() {
    QueryState& state = *current_.state;
    for (int c = 0; c < 2; ++c) {
      float* const at = state.reference + c * kLanes;
      float* const sum = state.row_sum + c * kLanes;
      const Vec earlier = load(at), moved = max(earlier, largest_score(c));
      const Vec row_scale =
          rescale(finite_reference(moved), earlier, load(state.scale_log2 + c * kLanes));
      store(at, moved);
      store(sum, load(sum) * row_scale);
      if (current_.first) continue;
      float* acc_o = current_.acc_o + c * kTile;
      for (int d = 0; d < Stages::kChannelTiles; ++d, acc_o += 2 * kTile) {
        for (int64_t i = 0; i < kTile; i += kLanes) store(acc_o + i, load(acc_o + i) * row_scale);
      }
    }
  }

  void hide() {
    const QueryRange& range = ranges_[current_.query_tile];
    const BlockMask<2> mask(range, current_.first_key);
    const KeyRange unmasked{range.all.begin - current_.first_key,
                            range.all.end - current_.first_key};
    for (int64_t key = 0; key < num_keys(); ++key) {
      if (unmasked.begin <= key && key < unmasked.end) continue;
      float* row = scratch_.scores + key / kTileRows * 2 * kTile + key % kTileRows * kLanes;
      for (int c = 0; c < 2; ++c) store(row + c * kTile, mask.apply(load(row + c * kTile), c, key));
    }
  }

  Stages stages_;
  ItemScratch scratch_;
  const QueryRange* ranges_;
  const Finish& finish_;
  Item current_{}, earlier_{};
  bool has_current_ = false, has_earlier_ = false;
};

}  // namespace drope::DROPE_ISA
