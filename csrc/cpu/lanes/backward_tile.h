// One tile of queries in the backward pass and its five products with a block of keys.
//
//   S = K Q^T, dP = V dO^T      lanes are queries, kRows keys at a time
//   P = 2^(exponent(S) - L)     dS = scale * P * (dP - delta)
//   dQ += K^T dS                lanes are queries
//   dK += dS^T Q, dV += P^T dO  lanes are channels
#pragma once

#include "cpu/lanes/gemm.h"
#include "cpu/lanes/pack.h"
#include "cpu/mask.h"
#include "cpu/softmax.h"

namespace drope::DROPE_ISA {

// Micro-kernel of dK and dV. 4 x 4 vectors where there are 32 registers.
inline constexpr int kGradRows = 4;
inline constexpr int kGradVecs = kRows == 8 ? 4 : kMaxVecs;
inline constexpr int kForWriting = 1;  // second argument of __builtin_prefetch

// One kv head, packed once for all its queries, and float32 gradients that tiles add to. Keys count
// from the first one that any query sees.
struct BackwardHead {
  float* k_rows;      // row panels (keys / kRows, words(head_dim), kRows)
  float* v_rows;      // row panels (keys / kRows, words(head_dim_v), kRows)
  float* k_channels;  // per block of kBlockKv keys: channel panels (head_dim / kRows, words, kRows)
  float* grad_k;      // (keys, head_dim rounded up to kLanes)
  float* grad_v;      // (keys, head_dim_v rounded up to kLanes)
};

inline constexpr int64_t kBlockQ = kMaxVecs * kLanes;  // queries of a tile
template <class Dot>
inline constexpr int64_t kQueryWords = kBlockQ / Dot::kDepth;

// P and dS of a tile and a kv block, in each order that a product wants.
template <class Dot>
struct BackwardScores {
  float* p_rows;        // (kBlockKv, kQueryWords)
  float* grad_s_rows;   // (kBlockKv, kQueryWords)
  float* grad_s_lanes;  // (words(kBlockKv), kBlockQ); the same as grad_s_rows where kDepth is 1

  static constexpr int64_t kRowFloats = kBlockKv * kQueryWords<Dot>;
  static constexpr int64_t kFloats = (Dot::kDepth == 1 ? 2 : 3) * kRowFloats;

  explicit BackwardScores(float* memory)
      : p_rows(memory),
        grad_s_rows(memory + kRowFloats),
        grad_s_lanes(memory + kFloats - kRowFloats) {}
};

// A tile of kBlockQ queries. Lanes and rows past the last query are 0.
template <class Dot>
struct BackwardTile {
  int64_t head_dim, head_dim_v;
  float softcap;  // 0: none
  TileRange<kMaxVecs> range;

  float* q_lanes;         // lanes (words(head_dim), kBlockQ)
  float* grad_out_lanes;  // lanes (words(head_dim_v), kBlockQ)
  float* q_rows;          // (kQueryWords, head_dim rounded up to kLanes)
  float* grad_out_rows;   // (kQueryWords, head_dim_v rounded up to kLanes)
  float* grad_q_lanes;    // (head_dim rounded up to kLanes, kBlockQ), summed over the kv loop

  // Per query: P = 2^exponent(t, reference, scale_log2, minus_log2_sum); dS = P * (scale * dP +
  // minus_delta).
  float *reference, *scale_log2, *minus_log2_sum, *scale, *minus_delta;

  DROPE_INLINE int64_t channels() const { return round_up(head_dim, kLanes); }
  DROPE_INLINE int64_t channels_v() const { return round_up(head_dim_v, kLanes); }

  // Lays the arrays out in `memory`, unless that is null; returns how many floats they take.
  int64_t place(float* memory) {
    int64_t size = 0;
    const auto take = [memory, &size](float*& array, int64_t count) {
      array = memory == nullptr ? nullptr : memory + size;
      size += round_up(count, 16);  // whole cache lines
    };
    take(q_lanes, words<Dot>(head_dim) * kBlockQ);
    take(grad_out_lanes, words<Dot>(head_dim_v) * kBlockQ);
    take(q_rows, kQueryWords<Dot> * channels());
    take(grad_out_rows, kQueryWords<Dot> * channels_v());
    take(grad_q_lanes, channels() * kBlockQ);
    for (float** row : {&reference, &scale_log2, &minus_log2_sum, &scale, &minus_delta}) {
      take(*row, kBlockQ);
    }
    return size;
  }
};

// The part of a kv block that a tile visits. Vectors v and up of the tile's lanes see keys
// [vec_end[v - 1], vec_end[v]) and no lower vector does; all are multiples of kRows.
struct VisitedKeys {
  int64_t block;  // first key of the block
  int64_t begin;
  int64_t vec_end[kMaxVecs];
  KeyRange unmasked;

  DROPE_INLINE VisitedKeys(const TileRange<kMaxVecs>& range, int64_t block_begin,
                           int64_t block_keys)
      : block(block_begin), unmasked{range.all.begin - block, range.all.end - block} {
    begin = std::max<int64_t>(0, (range.any.begin - block) / kRows * kRows);
    for (int v = 0; v < kMaxVecs; ++v) {
      vec_end[v] = std::clamp(round_up(range.vec_end[v] - block, kRows), begin, block_keys);
    }
  }
  DROPE_INLINE int64_t vec_begin(int v) const { return v == 0 ? begin : vec_end[v - 1]; }
};

// P of kRows keys from their products with the queries, and in weight P times the cap's derivative.
template <class Dot, int kFirst>
DROPE_INLINE void probabilities(const BackwardTile<Dot>& tile, int64_t key,
                                const BlockMask<kMaxVecs>* mask, float* p_rows,
                                Vec (&acc_s)[kRows][kMaxVecs], Vec (&weight)[kRows][kMaxVecs]) {
  const bool capped = tile.softcap > 0.0f;
  if (capped) {
    const Vec inverse_softcap = broadcast(1.0f / tile.softcap);
    for (int r = 0; r < kRows; ++r) {
      for (int v = kFirst; v < kMaxVecs; ++v) {
        acc_s[r][v] = cap_score(acc_s[r][v], load(tile.scale + v * kLanes), inverse_softcap);
        const Vec tanh_s = acc_s[r][v] * broadcast(1.0f / kCapUnit);
        weight[r][v] = broadcast(1.0f) - tanh_s * tanh_s;
      }
    }
  }
#pragma GCC unroll 8
  for (int v = kFirst; v < kMaxVecs; ++v) {
    const Vec reference = load(tile.reference + v * kLanes);
    const Vec scale_log2 = load(tile.scale_log2 + v * kLanes);
    const Vec minus_log2_sum = load(tile.minus_log2_sum + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      acc_s[r][v] = exponent(acc_s[r][v], reference, scale_log2, minus_log2_sum);
    }
  }
  if (mask != nullptr) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = kFirst; v < kMaxVecs; ++v) acc_s[r][v] = mask->apply(acc_s[r][v], v, key + r);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = kFirst; v < kMaxVecs; ++v) {
      const Vec p = probability<Dot>(acc_s[r][v]);
      Dot::store_elements(p_rows + r * kQueryWords<Dot>, v * kLanes, p);
      weight[r][v] = capped ? p * weight[r][v] : p;
    }
  }
}

// P and dS of the visited keys of a block, from those that only vectors kFirst and up see.
template <class Dot, int kFirst>
DROPE_NOINLINE void differentiate_scores(const BackwardTile<Dot>& tile, const BackwardHead& head,
                                         const VisitedKeys& visited,
                                         const BlockMask<kMaxVecs>& mask,
                                         const BackwardScores<Dot>& scores) {
  const int64_t k_words = words<Dot>(tile.head_dim), v_words = words<Dot>(tile.head_dim_v);
  for (int64_t key = visited.vec_begin(kFirst); key < visited.vec_end[kFirst]; key += kRows) {
    const bool masked = key < visited.unmasked.begin || key + kRows > visited.unmasked.end;
    float* p_rows = scores.p_rows + key * kQueryWords<Dot>;
    float* grad_s_rows = scores.grad_s_rows + key * kQueryWords<Dot>;
    float* grad_s_lanes = scores.grad_s_lanes + key / 2 * kBlockQ;
    Vec weight[kRows][kMaxVecs];
    Vec acc[kRows][kMaxVecs];
    clear(acc);
    multiply_accumulate<Dot, kFirst>(panel(head.k_rows + (visited.block + key) * k_words),
                                     tile.q_lanes + kFirst * kLanes, kBlockQ, k_words, acc);
    probabilities<Dot, kFirst>(tile, key, masked ? &mask : nullptr, p_rows, acc, weight);

    clear(acc);
    multiply_accumulate<Dot, kFirst>(panel(head.v_rows + (visited.block + key) * v_words),
                                     tile.grad_out_lanes + kFirst * kLanes, kBlockQ, v_words, acc);
#pragma GCC unroll 8
    for (int v = kFirst; v < kMaxVecs; ++v) {
      const Vec scale = load(tile.scale + v * kLanes);
      const Vec minus_delta = load(tile.minus_delta + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        acc[r][v] = weight[r][v] * fma(acc[r][v], scale, minus_delta);
        Dot::store_elements(grad_s_rows + r * kQueryWords<Dot>, v * kLanes, acc[r][v]);
        if constexpr (Dot::kDepth == 2) {
          if (r % 2 == 1) {
            store(grad_s_lanes + r / 2 * kBlockQ + v * kLanes, Dot::pair(acc[r - 1][v], acc[r][v]));
          }
        }
      }
    }
  }
  if constexpr (kFirst + 1 < kMaxVecs) {
    differentiate_scores<Dot, kFirst + 1>(tile, head, visited, mask, scores);
  }
}

// acc += K^T dS for kRows channels, each vector of the tile over the keys that it sees.
template <class Dot, int kFirst>
DROPE_INLINE void add_visited_keys(const float* k_panel, const float* grad_s_lanes,
                                   const VisitedKeys& visited, Vec (&acc)[kRows][kMaxVecs]) {
  const int64_t begin = visited.vec_begin(kFirst) / Dot::kDepth;
  const int64_t end = visited.vec_end[kFirst] / Dot::kDepth;
  multiply_accumulate<Dot, kFirst>(panel(k_panel + begin * kRows),
                                   grad_s_lanes + begin * kBlockQ + kFirst * kLanes, kBlockQ,
                                   end - begin, acc);
  if constexpr (kFirst + 1 < kMaxVecs) {
    add_visited_keys<Dot, kFirst + 1>(k_panel, grad_s_lanes, visited, acc);
  }
}

// dQ += K^T dS over the visited keys of a block, whose channel panels are block_words deep.
template <class Dot>
DROPE_NOINLINE void accumulate_grad_q(const BackwardTile<Dot>& tile, const float* k_channels,
                                      int64_t block_words, const VisitedKeys& visited,
                                      const float* grad_s_lanes) {
  for (int64_t channel = 0; channel < tile.head_dim; channel += kRows) {
    const float* k_panel = k_channels + channel * block_words;
    float* grad_q = tile.grad_q_lanes + channel * kBlockQ;
    // A block's sum is formed apart: over many blocks that loses fewer bits than one long sum.
    Vec acc[kRows][kMaxVecs];
    clear(acc);
    add_visited_keys<Dot, 0>(k_panel, grad_s_lanes, visited, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kMaxVecs; ++v) {
        float* sum = grad_q + r * kBlockQ + v * kLanes;
        store(sum, load(sum) + acc[r][v]);
      }
    }
  }
}

// grad(key, channel) += weights^T rows over the queries of a tile, for kVecCount vectors of
// channels.
template <class Dot, int kVecCount>
DROPE_INLINE void accumulate_channels(const float* weights, const float* rows, int64_t stride,
                                      const VisitedKeys& visited, float* grad) {
  for (int first = 0; first < kMaxVecs; ++first) {
    const int64_t first_word = first * kLanes / Dot::kDepth;  // earlier queries do not see the keys
    for (int64_t key = visited.vec_begin(first); key < visited.vec_end[first]; key += kGradRows) {
      float* grad_rows = grad + key * stride;
      for (int r = 0; r < kGradRows; ++r) {  // the next ones, from L2 or L3
        for (int v = 0; v < kVecCount; ++v) {
          __builtin_prefetch(grad_rows + (kGradRows + r) * stride + v * kLanes, kForWriting);
        }
      }
      Vec acc[kGradRows][kVecCount];
      clear(acc);
      multiply_accumulate<Dot, 0>(
          {weights + key * kQueryWords<Dot> + first_word, kQueryWords<Dot>, 1},
          rows + first_word * stride, stride, kQueryWords<Dot> - first_word, acc);
#pragma GCC unroll 8
      for (int r = 0; r < kGradRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecCount; ++v) {
          float* sum = grad_rows + r * stride + v * kLanes;
          store(sum, load(sum) + acc[r][v]);
        }
      }
    }
  }
}

template <class Dot, int kVecCount>
DROPE_INLINE void accumulate_vecs(int64_t vecs, const float* weights, const float* rows,
                                  int64_t stride, const VisitedKeys& visited, float* grad) {
  if (vecs == kVecCount) {
    accumulate_channels<Dot, kVecCount>(weights, rows, stride, visited, grad);
  } else if constexpr (kVecCount > 1) {
    accumulate_vecs<Dot, kVecCount - 1>(vecs, weights, rows, stride, visited, grad);
  }
}

// All channels of dK (weights dS, rows q) or dV (weights P, rows dO) of the visited keys.
template <class Dot>
DROPE_NOINLINE void accumulate_key_grad(const float* weights, const float* rows, int64_t channels,
                                        const VisitedKeys& visited, float* grad) {
  for (int64_t channel = 0; channel < channels;) {
    // A rest that does not fill two products is halved: a thin one could not hide its latency.
    const int64_t rest = (channels - channel) / kLanes;
    const bool halve = rest > kGradVecs && rest < 2 * kGradVecs - 1;
    const int64_t vecs = halve ? (rest + 1) / 2 : std::min<int64_t>(rest, kGradVecs);
    accumulate_vecs<Dot, kGradVecs>(vecs, weights, rows + channel, channels, visited,
                                    grad + channel);
    channel += vecs * kLanes;
  }
}

// The five products of a tile with one block of keys, if it sees any of them.
template <class Dot>
void differentiate_block(const BackwardTile<Dot>& tile, const BackwardHead& head, int64_t block,
                         int64_t block_keys, const BackwardScores<Dot>& scores) {
  if (block >= tile.range.any.end || block + block_keys <= tile.range.any.begin) return;
  const VisitedKeys visited(tile.range, block, block_keys);
  const BlockMask<kMaxVecs> mask(tile.range, block);
  differentiate_scores<Dot, 0>(tile, head, visited, mask, scores);
  accumulate_grad_q(tile, head.k_channels + block / Dot::kDepth * round_up(tile.head_dim, kRows),
                    words<Dot>(block_keys), visited, scores.grad_s_lanes);
  const int64_t channels = tile.channels(), channels_v = tile.channels_v();
  accumulate_key_grad<Dot>(scores.grad_s_rows, tile.q_rows, channels, visited,
                           head.grad_k + block * channels);
  accumulate_key_grad<Dot>(scores.p_rows, tile.grad_out_rows, channels_v, visited,
                           head.grad_v + block * channels_v);
}

}  // namespace drope::DROPE_ISA
