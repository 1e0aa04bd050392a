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

// P and dS of a block take half of the L1 cache. Half as many queries would move the sums of dK and
// dV twice as often.
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
  float* grad_k;            // (key tile, tiles of channels), float32
  float* grad_v;            // (key tile, tiles of channels), float32
};

// Between the products of an block.
struct BlockScores {
  float* scores;          // (key tile, kSliceVecs): S, then P in float32
  float* grad_p;          // (key tile, kSliceVecs)
  float* grad_s_columns;  // (step of keys, kSliceVecs)
  float* p_rows;          // (slice, key tile), words of queries (i, i + 16)
  float* grad_s_rows;     // (slice, key tile), the same

  static constexpr int64_t kSliceTiles = kKeyTiles * kSliceVecs;
  static constexpr int64_t kFloats =
      (2 * kSliceTiles + kKeySteps * kSliceVecs + 2 * kSlices * kKeyTiles) * kTile;

  explicit BlockScores(float* memory)
      : scores(memory),
        grad_p(scores + kSliceTiles * kTile),
        grad_s_columns(grad_p + kSliceTiles * kTile),
        p_rows(grad_s_columns + kKeySteps * kSliceVecs * kTile),
        grad_s_rows(p_rows + kSlices * kKeyTiles * kTile) {}
};

// Row `key` of the first of kSliceVecs sums.
DROPE_INLINE float* row_of_sums(float* sums, int64_t key) {
  return sums + key / kTileRows * kSliceVecs * kTile + key % kTileRows * kLanes;
}
// Of words of queries.
DROPE_INLINE float* row_of_words(float* words, int64_t key) { return words + key * kLanes; }

// P of one key, in place of its scores and as words. A null mask hides nothing.
DROPE_INLINE void form_probabilities(const RowTerms& terms, const BlockMask<kSliceVecs>* mask,
                                     int64_t key, float* scores, float* p_rows) {
  float* row = row_of_sums(scores, key);
  Vec p[kSliceVecs];
#pragma GCC unroll 2
  for (int v = 0; v < kSliceVecs; ++v) {
    Vec log2_p = exponent(load(row + v * kTile), terms.reference[v], terms.scale_log2[v],
                          terms.minus_log2_sum[v]);
    if (mask != nullptr) log2_p = mask->apply(log2_p, v, key);
    p[v] = exp2_for_bf16(log2_p);
    store(row + v * kTile, p[v]);
  }
  store(row_of_words(p_rows, key), to_words(p[0], p[1]));
}

// dS of keys `key` and key + 1 as words of queries and as words of keys.
DROPE_INLINE void form_grad_scores(const RowTerms& terms, int64_t key, const BlockScores& block,
                                   float* grad_s_rows) {
  const float* p_row = row_of_sums(block.scores, key);
  const float* grad_p_row = row_of_sums(block.grad_p, key);
  Vec grad_s[2][kSliceVecs];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kSliceVecs; ++v) {
      const int64_t offset = i * kLanes + v * kTile;
      grad_s[i][v] = load(p_row + offset) *
                     fma(load(grad_p_row + offset), terms.scale[v], terms.minus_delta[v]);
    }
    store(row_of_words(grad_s_rows, key + i), to_words(grad_s[i][0], grad_s[i][1]));
  }
  float* columns =
      block.grad_s_columns + key / kStep * kSliceVecs * kTile + key % kStep / 2 * kLanes;
#pragma GCC unroll 2
  for (int v = 0; v < kSliceVecs; ++v) {
    store(columns + v * kTile, to_words(grad_s[0][v], grad_s[1][v]));
  }
}

// The products of keys or values with a slice: sums (key tile, kSliceVecs). Channels in ascending
// steps, from 0, as in the forward pass: its scores are these to the last bit.
template <int kDim, class Beside>
DROPE_INLINE void score_slice(const Tiles& tiles, const float* rows, const float* columns,
                              float* sums, const Beside& beside) {
  constexpr int kSteps = Channels<kDim>::kSteps;
  unroll<(kSteps + 1) / 2>([&](auto pair) DROPE_INLINE_LAMBDA {
    constexpr int kFirst = 2 * pair, kCount = std::min(2, kSteps - kFirst);
    multiply_columns<kCount>(tiles, {rows + kFirst * kTile, kSteps * kTile, kTile},
                             {columns + kFirst * kTile, kSteps * kTile, kTile},
                             kFirst == 0 ? Sums::kNew : Sums::kContinued,
                             {sums, kSliceVecs * kTile, kTile}, kKeyTiles, beside);
  });
}

// dQ of a slice.
template <int kDim, class Beside>
DROPE_INLINE void add_grad_q(const Tiles& tiles, const float* k_channels,
                             const float* grad_s_columns, float* grad_q, const Beside& beside) {
  constexpr int kTiles = Channels<kDim>::kTiles;
  multiply_columns<kKeySteps>(tiles, {k_channels, kTile, kTiles * kTile},
                              {grad_s_columns, kTile, kSliceVecs * kTile}, Sums::kContinued,
                              {grad_q, kSliceVecs * kTile, kTile}, kTiles, beside);
}

// dK (words dS, pairs of q) or dV (words P, pairs of dO) of kCount slices.
template <int kDim, int kCount>
DROPE_INLINE void add_key_grad(const Tiles& tiles, const float* words, const float* pairs,
                               float* grad) {
  constexpr int kTiles = Channels<kDim>::kTiles;
  for (int tile = 0; tile < kTiles; ++tile) {
    multiply_column<kCount>(tiles, {words, kTile, kKeyTiles * kTile},
                            {pairs + tile * kTile, 0, kTiles * kTile},
                            {grad + tile * kTile, kTiles * kTile, 0}, kKeyTiles);
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

template <int kDim>
void differentiate_slice(const Tiles& tiles, const QueryBlock& queries, int slice,
                         const KeyBlock& keys, const BlockScores& block) {
  const TileRange<kSliceVecs>& range = queries.ranges[slice];
  const RowTerms terms = queries.terms[slice];
  constexpr int64_t kColumns = kSliceQueries / 2 * kDim;
  score_slice<kDim>(tiles, keys.k_rows, queries.q_columns + slice * kColumns, block.scores,
                    NoWork{});
  score_slice<kDim>(tiles, keys.v_rows, queries.grad_out_columns + slice * kColumns, block.grad_p,
                    NoWork{});
  float* p_rows = block.p_rows + slice * kKeyTiles * kTile;
  float* grad_s_rows = block.grad_s_rows + slice * kKeyTiles * kTile;
  if (keys.first < range.all.begin || keys.first + kBlockKeys > range.all.end) {
    const BlockMask<kSliceVecs> mask(range, keys.first);
    for (int64_t key = 0; key < kBlockKeys; ++key) {
      form_probabilities(terms, &mask, key, block.scores, p_rows);
    }
  } else {
    for (int64_t key = 0; key < kBlockKeys; ++key) {
      form_probabilities(terms, nullptr, key, block.scores, p_rows);
    }
  }
  for (int64_t key = 0; key < kBlockKeys; key += 2) {
    form_grad_scores(terms, key, block, grad_s_rows);
  }
  add_grad_q<kDim>(tiles, keys.k_channels, block.grad_s_columns,
                   queries.grad_q + slice * kSliceQueries * kDim, NoWork{});
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
                         const BlockScores& block) {
  const KeyRange slices = seeing_slices(queries, keys.first);
  if (slices.empty()) return;
  for (int64_t slice = slices.begin; slice < slices.end; ++slice) {
    differentiate_slice<kDim>(tiles, queries, static_cast<int>(slice), keys, block);
  }
  add_key_grads<kDim>(tiles, static_cast<int>(slices.begin),
                      static_cast<int>(slices.end - slices.begin), block, queries, keys);
}

}  // namespace drope::DROPE_ISA
