// The kv loop of the forward pass, for one tile of queries whose keys and values are packed.
// Lanes are queries: scores are formed transposed, (key, query), so softmax needs no operation
// across lanes and probabilities are an operand of the second product as softmax leaves them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/lanes/gemm.h"
#include "cpu/lanes/pack.h"
#include "cpu/mask.h"

namespace drope::DROPE_ISA {

// Keys and values of one kv head, packed block by block. Key 0 of the packed arrays is `origin`.
struct PackedHead {
  const float* k;  // row panels (keys / kRows, words(head_dim), kRows)
  const float* v;  // per block: channel panels (head_dim_v / kRows, words(block keys), kRows)
  int64_t origin, num_keys;
  int64_t k_words;  // words(head_dim)
  int64_t v_dim;    // head_dim_v rounded up to kRows

  DROPE_INLINE int64_t block_keys(int64_t block_begin) const {
    return std::min(kBlockKv, round_up(num_keys - block_begin, kRows));
  }
};

// Working memory of one tile; p and acc_o have kVecCount * kLanes queries in their rows.
struct TileScratch {
  float* q;      // lanes (words(head_dim), query)
  float* p;      // scores, then probabilities as words: (kBlockKv, query)
  float* acc_o;  // (head_dim_v rounded up to kLanes, query)
};

// The running softmax of a tile: p = 2^exponent of each score against row_max.
template <int kVecCount>
struct Softmax {
  Vec scale[kVecCount];       // logit scales
  Vec scale_log2[kVecCount];  // from differences of t to exponents
  Vec row_max[kVecCount];     // of scores t; -inf while a row has seen no key
  Vec row_sum[kVecCount];

  DROPE_INLINE void start(int v, Vec logit_scale, float softcap) {
    scale[v] = logit_scale;
    scale_log2[v] = scale_to_log2(logit_scale, softcap);
    row_max[v] = broadcast(-kInfinity);
    row_sum[v] = zero();
  }

  // After new row maxima: the reference of exponents, finite also for rows without keys, and in
  // row_scale the factor that brings earlier sums to it.
  DROPE_INLINE Vec rebase(int v, Vec earlier_max, Vec& row_scale) const {
    const Vec no_key = broadcast(-kInfinity);
    const Vec reference = select(equal(row_max[v], no_key), zero(), row_max[v]);
    row_scale = rescale(reference, earlier_max, scale_log2[v]);
    return reference;
  }
};

// Scores of keys [begin, end) of a block for vectors kFirst and up of a tile, into p.
template <class Dot, int kFirst, int kVecCount>
DROPE_INLINE void score_keys(int64_t begin, int64_t end, KeyRange unmasked,
                             const BlockMask<kVecCount>& mask, const float* k_panels,
                             int64_t k_words, const TileScratch& tile, Vec (&row_max)[kVecCount]) {
  constexpr int64_t kQueries = kVecCount * kLanes;
  const float* const q = tile.q + kFirst * kLanes;
  float* const p = tile.p;
  // Copies of its own: a store of scores could change what a reference leads to.
  Vec max_s[kVecCount];
#pragma GCC unroll 8
  for (int v = kFirst; v < kVecCount; ++v) max_s[v] = row_max[v];
  for (int64_t key = begin; key < end; key += kRows) {
    Vec acc_s[kRows][kVecCount];
    clear(acc_s);
    multiply_accumulate<Dot, kFirst>(panel(k_panels + key * k_words), q, kQueries, k_words, acc_s);
    if (key < unmasked.begin || key + kRows > unmasked.end) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = kFirst; v < kVecCount; ++v) acc_s[r][v] = mask.apply(acc_s[r][v], v, key + r);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = kFirst; v < kVecCount; ++v) {
        max_s[v] = max(max_s[v], acc_s[r][v]);
        store(p + (key + r) * kQueries + v * kLanes, acc_s[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = kFirst; v < kVecCount; ++v) row_max[v] = max_s[v];
}

// Replaces products of q and k by capped scores, masked ones stay -inf. Of row_max only
// `earlier_max` knows of capped scores before this.
template <int kVecCount>
void cap_scores(const int64_t (&vec_keys)[kVecCount], const Vec (&scale)[kVecCount], float softcap,
                float* p, const Vec (&earlier_max)[kVecCount], Vec (&row_max)[kVecCount]) {
  const Vec inverse_softcap = broadcast(1.0f / softcap);
  for (int v = 0; v < kVecCount; ++v) {
    row_max[v] = earlier_max[v];
    for (int64_t key = 0; key < vec_keys[v]; ++key) {
      float* scores = p + (key * kVecCount + v) * kLanes;
      const Vec s = load(scores);
      const Vec capped =
          select(equal(s, broadcast(-kInfinity)), s, cap_score(s, scale[v], inverse_softcap));
      row_max[v] = max(row_max[v], capped);
      store(scores, capped);
    }
  }
}

// Scores of `num_keys` keys of one vector of queries become probabilities in words of Dot.
template <class Dot, int kVecCount>
DROPE_INLINE Vec exponentiate(int64_t num_keys, Vec scale_log2, Vec reference, float* p) {
  constexpr int64_t kQueries = kVecCount * kLanes;
  Vec even_sum = zero(), odd_sum = zero();
  const float* scores = p;
  for (int64_t key = 0; key < num_keys; key += 2, scores += 2 * kQueries) {
    const Vec even = probability<Dot>(exponent(load(scores), reference, scale_log2, zero()));
    const Vec odd =
        probability<Dot>(exponent(load(scores + kQueries), reference, scale_log2, zero()));
    even_sum = even_sum + even;
    odd_sum = odd_sum + odd;
    p = Dot::store_rows(p, kQueries, even, odd);
  }
  return even_sum + odd_sum;
}

// acc_o = row_scale * acc_o + v^T p over the keys of a block; vector v of the tile takes the first
// vec_keys[v] of them.
template <class Dot, int kVecCount>
DROPE_INLINE void accumulate(const int64_t (&vec_keys)[kVecCount], const float* v_panels,
                             int64_t v_dim, int64_t block_words, const TileScratch& tile,
                             const Vec (&row_scale)[kVecCount]) {
  constexpr int64_t kQueries = kVecCount * kLanes;
  constexpr int64_t kDepth = Dot::kDepth;
  for (int64_t channel = 0; channel < v_dim; channel += kRows) {
    const float* v_panel = v_panels + channel * block_words;
    Vec acc[kRows][kVecCount];
    clear(acc);
    int64_t w = vec_keys[0] / kDepth;
    multiply_accumulate<Dot, 0>(panel(v_panel), tile.p, kQueries, w, acc);
    if constexpr (kVecCount > 1) {
      const int64_t end = vec_keys[1] / kDepth;
      multiply_accumulate<Dot, 1>(panel(v_panel + w * kRows), tile.p + w * kQueries + kLanes,
                                  kQueries, end - w, acc);
      w = end;
    }
    if constexpr (kVecCount > 2) {
      const int64_t end = vec_keys[2] / kDepth;
      multiply_accumulate<Dot, 2>(panel(v_panel + w * kRows), tile.p + w * kQueries + 2 * kLanes,
                                  kQueries, end - w, acc);
    }
    float* acc_o = tile.acc_o + channel * kQueries;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecCount; ++v, acc_o += kLanes) {
        store(acc_o, fma(row_scale[v], load(acc_o), acc[r][v]));
      }
    }
  }
}

// The kv loop: leaves unnormalised output in tile.acc_o and the row sums in softmax.
template <class Dot, int kVecCount>
void attend(const PackedHead& head, const TileRange<kVecCount>& range, float softcap,
            Softmax<kVecCount>& softmax, const TileScratch& tile) {
  constexpr int64_t kQueries = kVecCount * kLanes;
  std::memset(tile.acc_o, 0, static_cast<uint64_t>(head.v_dim * kQueries) * sizeof(float));
  for (int64_t block = range.any.begin / kBlockKv * kBlockKv; block < range.any.end;
       block += kBlockKv) {
    const int64_t first_key = std::max(block, range.any.begin / kRows * kRows);
    const int64_t block_words = head.block_keys(block) / Dot::kDepth;
    const float* k = head.k + first_key * head.k_words;
    const float* v =
        head.v + block / Dot::kDepth * head.v_dim + (first_key - block) / Dot::kDepth * kRows;
    const KeyRange unmasked{range.all.begin - first_key, range.all.end - first_key};
    const BlockMask<kVecCount> mask(range, first_key);
    int64_t vec_keys[kVecCount];
    for (int i = 0; i < kVecCount; ++i) {
      const int64_t last_key = std::min(range.vec_end[i], block + kBlockKv);
      vec_keys[i] = round_up(std::max(last_key, first_key) - first_key, kRows);
    }

    Vec(&row_max)[kVecCount] = softmax.row_max;
    Vec earlier_max[kVecCount];
    for (int i = 0; i < kVecCount; ++i) earlier_max[i] = row_max[i];
    score_keys<Dot, 0>(0, vec_keys[0], unmasked, mask, k, head.k_words, tile, row_max);
    if constexpr (kVecCount > 1) {
      score_keys<Dot, 1>(vec_keys[0], vec_keys[1], unmasked, mask, k, head.k_words, tile, row_max);
    }
    if constexpr (kVecCount > 2) {
      score_keys<Dot, 2>(vec_keys[1], vec_keys[2], unmasked, mask, k, head.k_words, tile, row_max);
    }
    if (softcap > 0.0f) {
      cap_scores(vec_keys, softmax.scale, softcap, tile.p, earlier_max, row_max);
    }

    Vec row_scale[kVecCount];
    for (int i = 0; i < kVecCount; ++i) {
      const Vec reference = softmax.rebase(i, earlier_max[i], row_scale[i]);
      const Vec sum = exponentiate<Dot, kVecCount>(vec_keys[i], softmax.scale_log2[i], reference,
                                                   tile.p + i * kLanes);
      softmax.row_sum[i] = fma(softmax.row_sum[i], row_scale[i], sum);
    }
    accumulate<Dot>(vec_keys, v, head.v_dim, block_words, tile, row_scale);
  }
}

}  // namespace drope::DROPE_ISA
