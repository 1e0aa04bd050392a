// A block of the backward pass: kBlockQueries queries and kBlockKeys keys, in slices of
// kSliceQueries queries, and its five products.
//
//   S^T = K Q^T, dP^T = V dO^T       sums of 16 keys (rows) and 16 queries (lanes)
//   P = 2^(exponent(S) - L)          dS = P * (scale * dP + minus_delta)
//   dQ^T += K^T dS^T                 per slice: sums of 16 channels and 16 queries
//   dV += P^T dO, dK += dS^T Q       per block: sums of 16 keys and 16 channels
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/mask.h"
#include "cpu/softmax.h"
#include "cpu/tiles/backward_products.h"

namespace drope::DROPE_ISA {

// P and dS of a block take 32 KiB of the L1 cache. Half as many queries would move the sums of dK
// and dV twice as often.
inline constexpr int kSliceVecs = 2;
inline constexpr int kSlices = 4;
inline constexpr int64_t kSliceQueries = kSliceVecs * kLanes;
inline constexpr int64_t kBlockQueries = kSlices * kSliceQueries;
inline constexpr int64_t kBlockKeys = 64;
inline constexpr int kKeyTiles = kBlockKeys / kTileRows;
inline constexpr int kKeySteps = kBlockKeys / kStep;
static_assert(kSliceQueries == kStep && kSlices <= 4, "dK and dV contract a step per slice");

// Head dimensions are padded to kDim channels.
template <int kDim>
struct Channels {
  static constexpr int kSteps = kDim / kStep;
  static constexpr int kTiles = kDim / kTileRows;
};

// Per query: P = 2^exponent(t, reference, scale_log2, minus_log2_sum), dS = P * (scale * dP +
// minus_delta).
struct RowTerms {
  Vec reference[kSliceVecs], scale_log2[kSliceVecs], minus_log2_sum[kSliceVecs];
  Vec scale[kSliceVecs], minus_delta[kSliceVecs];
};

// What a group of queries keeps while it goes through the keys. Tiles of one slice are together.
struct QueryBlock {
  TileRange<kSliceVecs> ranges[kSlices];
  RowTerms terms[kSlices];
  float* q_columns;         // (slice, kSliceVecs, steps of channels)
  float* grad_out_columns;  // (slice, kSliceVecs, steps of channels)
  float* q_pairs;           // (slice, tiles of channels)
  float* grad_out_pairs;    // (slice, tiles of channels)
  float* grad_q;            // (slice, tiles of channels, kSliceVecs), float32

  static constexpr int64_t kOperand = kBlockQueries / 2;  // floats of an operand per channel
  static constexpr int64_t kFloats = 4 * kOperand + kBlockQueries;  // per channel

  void place(float* memory, int64_t dim) {
    q_columns = memory;
    grad_out_columns = q_columns + kOperand * dim;
    q_pairs = grad_out_columns + kOperand * dim;
    grad_out_pairs = q_pairs + kOperand * dim;
    grad_q = grad_out_pairs + kOperand * dim;
  }
};

// kBlockKeys keys, from key `first` of the packed head.
struct KeyBlock {
  int64_t first;
  const float* k_rows;      // (key tile, steps of channels)
  const float* v_rows;      // (key tile, steps of channels)
  const float* k_channels;  // (step of keys, tiles of channels)
  float* grad_k;            // (tiles of channels, key tile), float32
  float* grad_v;            // (tiles of channels, key tile), float32
};

// A product that adds to dQ of a slice.
struct GradQ {
  const float* k_channels;
  const float* grad_s_columns;
  float* grad_q;
};

// Between the products of a block.
struct BlockScores {
  float* scores;                // (key tile, kSliceVecs): S, then P in float32
  float* grad_p;                // (key tile, kSliceVecs)
  float* grad_s_columns;        // (step of keys, kSliceVecs)
  float* other_grad_s_columns;  // of the slice before
  float* p_rows;                // (slice, key tile), words of queries (i, i + 16)
  float* grad_s_rows;           // (slice, key tile), the same
  GradQ pending{};              // of the slice before, if there is one

  static constexpr int64_t kSliceTiles = kKeyTiles * kSliceVecs;
  static constexpr int64_t kFloats =
      (2 * kSliceTiles + 2 * kKeySteps * kSliceVecs + 2 * kSlices * kKeyTiles) * kTile;

  explicit BlockScores(float* memory)
      : scores(memory),
        grad_p(scores + kSliceTiles * kTile),
        grad_s_columns(grad_p + kSliceTiles * kTile),
        other_grad_s_columns(grad_s_columns + kKeySteps * kSliceVecs * kTile),
        p_rows(other_grad_s_columns + kKeySteps * kSliceVecs * kTile),
        grad_s_rows(p_rows + kSlices * kKeyTiles * kTile) {}
};

// Where row `key` of the first of kSliceVecs sums begins, by operations that cost a cycle each.
DROPE_INLINE int64_t row_of_sums(int64_t key) {
  static_assert(kSliceVecs == 2, "every 16 rows a second tile is skipped");
  return (key + (key & -kTileRows)) * kLanes;
}

struct NoMask {
  DROPE_INLINE NoMask(const TileRange<kSliceVecs>&, int64_t) {}
};

// P of the keys of a slice, in place of their scores and as words, kKeysAtATime per call. Without
// kMasked no query is kept from a key.
template <int kKeysAtATime, bool kMasked>
class FormProbabilities {
  static_assert(kTileRows % kKeysAtATime == 0, "keys of one call are rows of one tile");

 public:
  DROPE_INLINE FormProbabilities(const RowTerms& terms, const TileRange<kSliceVecs>& range,
                                 int64_t first_key, float* scores, float* p_rows)
      : mask_(range, first_key), scores_(scores), p_rows_(p_rows) {
#pragma GCC unroll 2
    for (int v = 0; v < kSliceVecs; ++v) {
      reference_[v] = terms.reference[v];
      scale_log2_[v] = terms.scale_log2[v];
      minus_log2_sum_[v] = terms.minus_log2_sum[v];
    }
  }

  DROPE_INLINE void operator()() {
    if (key_ >= kBlockKeys) return;
    float* const row = scores_ + row_of_sums(key_);
    float* const words = p_rows_ + key_ * kLanes;
#pragma GCC unroll 8
    for (int i = 0; i < kKeysAtATime; ++i) form(key_ + i, row + i * kLanes, words + i * kLanes);
    key_ += kKeysAtATime;
  }

 private:
  DROPE_INLINE void form(int64_t key, float* row, float* words) const {
    Vec p[kSliceVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kSliceVecs; ++v) {
      Vec log2_p =
          exponent(load(row + v * kTile), reference_[v], scale_log2_[v], minus_log2_sum_[v]);
      if constexpr (kMasked) log2_p = mask_.apply(log2_p, v, key);
      p[v] = exp2_for_bf16(log2_p);
      store(row + v * kTile, p[v]);
    }
    store(words, to_words(p[0], p[1]));
  }

  std::conditional_t<kMasked, BlockMask<kSliceVecs>, NoMask> mask_;
  float *scores_, *p_rows_;
  Vec reference_[kSliceVecs], scale_log2_[kSliceVecs], minus_log2_sum_[kSliceVecs];
  int64_t key_ = 0;
};

// dS of the keys of a slice as words of queries and as words of keys, kKeysAtATime per call.
template <int kKeysAtATime>
class FormGradScores {
  static_assert(kTileRows % kKeysAtATime == 0, "keys of one call are rows of one tile");

 public:
  DROPE_INLINE FormGradScores(const RowTerms& terms, const float* p, const float* grad_p,
                              float* rows, float* columns)
      : p_(p), grad_p_(grad_p), rows_(rows), columns_(columns) {
#pragma GCC unroll 2
    for (int v = 0; v < kSliceVecs; ++v) {
      scale_[v] = terms.scale[v];
      minus_delta_[v] = terms.minus_delta[v];
    }
  }

  DROPE_INLINE void operator()() {
    if (key_ >= kBlockKeys) return;
    const int64_t sums = row_of_sums(key_);
    float* const rows = rows_ + key_ * kLanes;
    float* const columns = columns_ + row_of_sums(key_ >> 1);
#pragma GCC unroll 8
    for (int i = 0; i < kKeysAtATime; i += 2) {
      form(sums + i * kLanes, rows + i * kLanes, columns + i / 2 * kLanes);
    }
    key_ += kKeysAtATime;
  }

 private:
  // Two keys, whose sums begin at `sums`.
  DROPE_INLINE void form(int64_t sums, float* rows, float* columns) const {
    Vec grad_s[2][kSliceVecs];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kSliceVecs; ++v) {
        const int64_t at = sums + i * kLanes + v * kTile;
        grad_s[i][v] = load(p_ + at) * fma(load(grad_p_ + at), scale_[v], minus_delta_[v]);
      }
      store(rows + i * kLanes, to_words(grad_s[i][0], grad_s[i][1]));
    }
#pragma GCC unroll 2
    for (int v = 0; v < kSliceVecs; ++v) {
      store(columns + v * kTile, to_words(grad_s[0][v], grad_s[1][v]));
    }
  }

  const float *p_, *grad_p_;
  float *rows_, *columns_;
  Vec scale_[kSliceVecs], minus_delta_[kSliceVecs];
  int64_t key_ = 0;
};

// The products of keys or values with a slice: sums (key tile, kSliceVecs). Channels in ascending
// steps, from 0, as in the forward pass: its scores are these to the last bit.
template <int kDim, class Beside>
DROPE_INLINE void score_slice(const Tiles& tiles, const float* rows, const float* columns,
                              float* sums, Beside& beside) {
  constexpr int kSteps = Channels<kDim>::kSteps;
  const TileOperand a{rows, kSteps * kTile, kTile}, b{columns, kSteps * kTile, kTile};
  const TileSums c{sums, kSliceVecs * kTile, kTile};
  if constexpr (kSteps <= 2) {
    multiply_columns<kSteps>(tiles, a, b, Sums::kNew, c, kKeyTiles, beside);
  } else {
    multiply_squares<kSteps>(tiles, a, b, c, kKeyTiles, beside);
  }
}

template <int kDim, class Beside>
DROPE_INLINE void add_grad_q(const Tiles& tiles, const GradQ& of, Beside& beside) {
  constexpr int kTiles = Channels<kDim>::kTiles;
  multiply_columns<kKeySteps>(tiles, {of.k_channels, kTile, kTiles * kTile},
                              {of.grad_s_columns, kTile, kSliceVecs * kTile}, Sums::kContinued,
                              {of.grad_q, kSliceVecs * kTile, kTile}, kTiles, beside);
}

// dK (words dS, pairs of q) or dV (words P, pairs of dO) of kCount slices.
template <int kDim, int kCount>
DROPE_INLINE void add_key_grad(const Tiles& tiles, const float* words, const float* pairs,
                               float* grad) {
  constexpr int kTiles = Channels<kDim>::kTiles;
  for (int tile = 0; tile < kTiles; ++tile) {
    multiply_column<kCount>(tiles, {words, kTile, kKeyTiles * kTile},
                            {pairs + tile * kTile, 0, kTiles * kTile},
                            {grad + tile * kKeyTiles * kTile, kTile, 0}, kKeyTiles);
  }
}

template <int kDim>
void add_key_grads(const Tiles& tiles, int first, int count, const BlockScores& block,
                   const QueryBlock& queries, const KeyBlock& keys) {
  const int64_t words = first * kKeyTiles * kTile;
  const int64_t pairs = first * Channels<kDim>::kTiles * kTile;
  unroll<kSlices>([&](auto index) DROPE_INLINE_LAMBDA {
    constexpr int kCount = index + 1;
    if (kCount != count) return;
    add_key_grad<kDim, kCount>(tiles, block.p_rows + words, queries.grad_out_pairs + pairs,
                               keys.grad_v);
    add_key_grad<kDim, kCount>(tiles, block.grad_s_rows + words, queries.q_pairs + pairs,
                               keys.grad_k);
  });
}

// How many keys of a slice each of `kProducts` products takes along: even, and all in the end.
template <int kProducts>
inline constexpr int kKeysBeside = (kBlockKeys + 2 * kProducts - 1) / (2 * kProducts) * 2;

template <int kDim, bool kMasked>
void differentiate_slice(const Tiles& tiles, const QueryBlock& queries, int slice,
                         const KeyBlock& keys, BlockScores& block) {
  constexpr int kProducts = 2 * kKeyTiles * Channels<kDim>::kSteps;
  constexpr int kKeys = kKeysBeside<kProducts>;
  constexpr int64_t kColumns = kSliceQueries / 2 * kDim;
  score_slice<kDim>(tiles, keys.k_rows, queries.q_columns + slice * kColumns, block.scores,
                    kNoWork);
  FormProbabilities<kKeys, kMasked> probabilities(queries.terms[slice], queries.ranges[slice],
                                                  keys.first, block.scores,
                                                  block.p_rows + slice * kKeyTiles * kTile);
  score_slice<kDim>(tiles, keys.v_rows, queries.grad_out_columns + slice * kColumns, block.grad_p,
                    probabilities);
  FormGradScores<kKeys> grad_scores(queries.terms[slice], block.scores, block.grad_p,
                                    block.grad_s_rows + slice * kKeyTiles * kTile,
                                    block.grad_s_columns);
  if (block.pending.grad_q == nullptr) {
    for (int i = 0; i < kProducts; ++i) grad_scores();
  } else {
    add_grad_q<kDim>(tiles, block.pending, grad_scores);
  }
  block.pending = {keys.k_channels, block.grad_s_columns,
                   queries.grad_q + slice * kSliceQueries * kDim};
  std::swap(block.grad_s_columns, block.other_grad_s_columns);
}

// The slices that see a key of the block: a run of them, as both ends of what queries see ascend.
DROPE_INLINE KeyRange seeing_slices(const QueryBlock& queries, int64_t first_key) {
  KeyRange slices{0, 0};
  for (int slice = 0; slice < kSlices; ++slice) {
    const KeyRange& any = queries.ranges[slice].any;
    if (any.empty() || any.end <= first_key || any.begin >= first_key + kBlockKeys) continue;
    slices = {slices.empty() ? slice : slices.begin, slice + 1};
  }
  return slices;
}

template <int kDim>
void differentiate_block(const Tiles& tiles, const QueryBlock& queries, const KeyBlock& keys,
                         BlockScores& block) {
  const KeyRange slices = seeing_slices(queries, keys.first);
  if (slices.empty()) return;
  const int begin = static_cast<int>(slices.begin), end = static_cast<int>(slices.end);
  for (int slice = begin; slice < end; ++slice) {
    const KeyRange& all = queries.ranges[slice].all;
    if (all.begin <= keys.first && keys.first + kBlockKeys <= all.end) {
      differentiate_slice<kDim, false>(tiles, queries, slice, keys, block);
    } else {
      differentiate_slice<kDim, true>(tiles, queries, slice, keys, block);
    }
  }
  add_key_grads<kDim>(tiles, begin, end - begin, block, queries, keys);
}

// What the last slice left to do.
template <int kDim>
void finish_grad_q(const Tiles& tiles, BlockScores& block) {
  if (block.pending.grad_q != nullptr) add_grad_q<kDim>(tiles, block.pending, kNoWork);
  block.pending = {};
}

}  // namespace drope::DROPE_ISA
