// Items one after the other, three in progress: while one is exponentiated, the next one's scores
// and the earlier one's output are computed.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/mask.h"
#include "cpu/tiles/item.h"

namespace drope::DROPE_ISA {

using QueryRange = TileRange<2>;
static_assert(QueryRange::kQueries == kItemQueries, "a range per item");

// P may be this many octaves above 1 before the row's reference moves: in bf16 it costs no bit, and
// moving rescales all of the row's output.
inline constexpr float kOctavesOfHeadroom = 8.0f;

// `Finish` is called with an item once the output of its queries is complete.
template <int kDim, class Finish>
class Pipeline {
  using Stages = ItemStages<kDim>;

 public:
  DROPE_INLINE Pipeline(const Tiles& tiles, float* memory, const QueryRange* ranges,
                        const Finish& finish)
      : stages_(tiles), scratch_(memory), ranges_(ranges), finish_(finish) {}

  void push(const Item& next) {
    if (has_current_) settle_reference();
    if (has_earlier_) {
      advance(next);
      finish_earlier();
    } else {
      if (has_current_) exponentiate();
      stages_.template score<false>(next, scratch_.scores, nullptr, nullptr, [](auto) {});
    }
    shift();
    current_ = next;
    has_current_ = true;
  }

  void drain() {
    if (has_current_) settle_reference();
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

  // The three stages of three items, each product with its share of the exponentials.
  void advance(const Item& next) {
    Exponentiation exponentiation(*current_.state, scratch_.scores, scratch_.p);
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
  }

  // Portions before a slot of `score`. Where the next P is loaded in the last slots it is complete
  // two slots earlier.
  static constexpr int score_share(int slot) {
    constexpr int kHalf = Exponentiation::kPortions / 2, kSlots = Stages::kScoreSlots;
    if (!Stages::kKeepsQueries || slot <= kSlots - 4) return kHalf * slot / kSlots;
    return slot == kSlots - 3 ? kHalf - 2 : kHalf;
  }

  void exponentiate() {
    Exponentiation(*current_.state, scratch_.scores, scratch_.p).run(0, Exponentiation::kPortions);
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

  // Hides what is hidden from scores of the current item, and moves the reference of rows that
  // outgrew it.
  void settle_reference() {
    if (current_.masked) hide();
    Vec largest[2], and_odd[2];
    const float* s = scratch_.scores;
    for (int c = 0; c < 2; ++c) {
      largest[c] = load(s + c * kTile);
      and_odd[c] = load(s + c * kTile + kLanes);
    }
#pragma GCC unroll 8
    for (int64_t key = 2; key < kItemKeys; key += 2) {
      const float* row = s + key / kTileRows * 2 * kTile + key % kTileRows * kLanes;
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        largest[c] = max(largest[c], load(row + c * kTile));
        and_odd[c] = max(and_odd[c], load(row + c * kTile + kLanes));
      }
    }
    QueryState& state = *current_.state;
    bool outgrown = false;
    for (int c = 0; c < 2; ++c) {
      largest[c] = max(largest[c], and_odd[c]);
      const Vec octaves = exponent(largest[c], load(state.reference + c * kLanes),
                                   load(state.scale_log2 + c * kLanes), zero());
      outgrown = outgrown || any(less(broadcast(kOctavesOfHeadroom), octaves));
    }
    if (current_.first) {
      for (int c = 0; c < 2; ++c) store(state.reference + c * kLanes, largest[c]);
    } else if (outgrown) {
      accumulate_earlier();
      rebase(largest);
    }
  }

  void rebase(const Vec (&largest)[2]) {
    QueryState& state = *current_.state;
    for (int c = 0; c < 2; ++c) {
      float* const at = state.reference + c * kLanes;
      float* const sum = state.row_sum + c * kLanes;
      const Vec earlier = load(at), moved = max(earlier, largest[c]);
      const Vec row_scale =
          rescale(finite_reference(moved), earlier, load(state.scale_log2 + c * kLanes));
      store(at, moved);
      store(sum, load(sum) * row_scale);
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
    for (int64_t key = 0; key < kItemKeys; ++key) {
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
