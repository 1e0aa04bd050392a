// Decode for few queries:
//   for each split of a row's keys and each kv head
//     for each block of keys: rotate k where the cache is raw, then attend      (decode_block.h)
//   merge the splits, divide by the row sums, store out and lse
#pragma once

#include <cmath>
#include <utility>

#include "cpu/attention_cpu.h"
#include "cpu/lanes/decode_block.h"
#include "cpu/lanes/decode_cache.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace drope::DROPE_ISA {

// How a call is cut into tasks. Depends on shapes and lengths only: any number of threads gives the
// same bits.
template <class Dot>
struct DecodePlan {
  int64_t block_keys;          // a multiple of kKeyGroup
  int64_t num_queries;         // that share a kv head
  int64_t stride_q, stride_o;  // floats
  bool rotates_keys;
  bool shared_angles;       // by all heads
  int64_t heads_at_a_time;  // kv heads of a task, which share the angles of its keys
  int64_t chunk_keys;       // of a task, whose angles are tabulated together
  int64_t head_groups;
  int64_t max_splits;                          // of the keys of a batch row
  int64_t q_size, s_size, o_size, state_size;  // floats of a tile
  int64_t row_stride;                          // elements of a rotated key
  int64_t row_lines;                           // cache lines of a value
  int64_t k_size, angles_size;                 // floats of a block of rotated keys, of angles
  int num_threads;

  DecodePlan(const AttentionDecodeParams& p, const CpuOptions& options) {
    constexpr int64_t kGroup = kLanes * Dot::kDepth;
    const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
    const int64_t fitting = kBlockBytes / std::max<int64_t>(p.head_dim * element, 1);
    block_keys = std::clamp(fitting / kKeyGroup * kKeyGroup, kKeyGroup, kDecodeKeys);
    num_queries = p.num_heads_q / std::max<int64_t>(p.num_heads_kv, 1) * p.seqlen_q;
    stride_q = round_up(p.head_dim, kGroup) / Dot::kDepth;
    stride_o = round_up(p.head_dim_v, kGroup);
    rotates_keys = p.rotary.rotary_dim > 0 && !p.rotated_cache;
    shared_angles = rotates_keys && p.rotary.num_tables == 1;
    heads_at_a_time =
        shared_angles ? std::max<int64_t>(1, std::min(p.num_heads_kv, kHeadsSharingAngles)) : 1;
    chunk_keys = shared_angles ? round_up(kKeysSharingAngles, block_keys) : p.seqlen_kv;
    head_groups = (p.num_heads_kv + heads_at_a_time - 1) / heads_at_a_time;
    max_splits = 0;
    double num_elements = 0.0;
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      const KeyRange keys = visible_to_any(p, batch);
      const int64_t num_keys = keys.end - keys.begin;
      const int64_t split = split_keys(num_keys);
      max_splits = std::max(max_splits, (num_keys + split - 1) / split);
      num_elements += static_cast<double>(num_keys * p.num_heads_kv) *
                      static_cast<double>(p.head_dim + p.head_dim_v);
    }
    q_size = num_queries * stride_q;
    s_size = num_queries * kDecodeKeys;
    o_size = num_queries * stride_o;
    state_size = num_queries * static_cast<int64_t>(sizeof(QueryState) / sizeof(float));
    row_stride = round_up(p.head_dim, kGroup);
    row_lines = (p.head_dim_v * element + 63) / 64;
    k_size = rotates_keys ? kDecodeKeys * row_stride : 0;
    angles_size = shared_angles ? chunk_keys * RotaryRows::angle_floats(p.rotary.rotary_dim) : 0;
    num_threads =
        std::max(1, std::min(options.num_threads,
                             static_cast<int>(std::min(num_elements / kElementsPerThread, 1e6))));
  }

  DROPE_INLINE int64_t split_keys(int64_t num_keys) const {
    const int64_t least = kKeysPerTask / heads_at_a_time;
    return round_up(std::max(least, (num_keys + kMaxSplits - 1) / kMaxSplits), kDecodeKeys);
  }

  DROPE_INLINE int64_t head_size() const { return q_size + s_size + o_size + state_size; }
  DROPE_INLINE int64_t part_size() const { return o_size + 2 * round_up(num_queries, kLanes); }

  // Of a block of k: v of the block and k of the next one share L1 with it.
  static constexpr int64_t kBlockBytes = 8 << 10;
  static constexpr int64_t kHeadsSharingAngles = 8;
  // Their angles stay in L2. Runs of one head are long: memory answers short ones, of many heads in
  // turn, more slowly.
  static constexpr int64_t kKeysSharingAngles = 256;
  static constexpr int64_t kKeysPerTask = 2048;
  static constexpr int64_t kMaxSplits = 64;
  static constexpr double kElementsPerThread = 256e3;  // fewer are not worth a wake-up
};

template <class Element, class Dot>
class DecodeSplits {
  using Storage = typename Element::Storage;
  using Operand = typename Dot::Operand;

 public:
  DecodeSplits(const AttentionDecodeParams& params, const CpuOptions& options)
      : p_(params),
        plan_(params, options),
        tiles_(plan_.num_threads * worker_size()),
        parts_(p_.batch * p_.num_heads_kv * plan_.max_splits * plan_.part_size()),
        zeros_(round_up(std::max<int64_t>(p_.head_dim_v, 1), kLanes)) {
    std::memset(zeros_.data(), 0, static_cast<uint64_t>(p_.head_dim_v) * sizeof(float));
  }

  void run() const {
    const int64_t num_heads = p_.batch * p_.num_heads_kv;
    const int64_t per_batch = plan_.head_groups * plan_.max_splits;
    parallel_for(plan_.num_threads, p_.batch * per_batch, [&](int64_t task, int worker) {
      const int64_t group = task % per_batch / plan_.max_splits;
      attend_split(task / per_batch, group * plan_.heads_at_a_time, task % plan_.max_splits,
                   worker);
    });
    parallel_for(plan_.num_threads, num_heads, [&](int64_t task, int) {
      merge_splits(task / p_.num_heads_kv, task % p_.num_heads_kv);
    });
  }

 private:
  int64_t worker_size() const {
    return plan_.heads_at_a_time * plan_.head_size() + plan_.k_size + plan_.angles_size;
  }

  float* part(int64_t batch, int64_t kv_head, int64_t split) const {
    const int64_t index = (batch * p_.num_heads_kv + kv_head) * plan_.max_splits + split;
    return parts_.data() + index * plan_.part_size();
  }

  KeyRange keys_of_split(int64_t batch, int64_t split) const {
    const KeyRange all = visible_to_any(p_, batch);
    const int64_t count = plan_.split_keys(all.end - all.begin);
    const int64_t begin = all.begin + split * count;
    return {std::min(begin, all.end), std::min(begin + count, all.end)};
  }

  void attend_split(int64_t batch, int64_t first_head, int64_t split, int worker) const {
    const KeyRange keys = keys_of_split(batch, split);
    if (keys.empty()) return;
    const int64_t num_heads = std::min(plan_.heads_at_a_time, p_.num_heads_kv - first_head);
    float* const memory = tiles_.data() + worker * worker_size();
    for (int64_t i = 0; i < num_heads; ++i) {
      start_queries(batch, first_head + i, tile_at(memory + i * plan_.head_size()));
    }
    float* const rotated = memory + plan_.heads_at_a_time * plan_.head_size();
    RotaryRows rotation{};
    if (plan_.rotates_keys) rotation = key_rotation(p_, batch, first_head, 1.0f);
    if (plan_.shared_angles) rotation.angles = rotated + plan_.k_size;

    BlockRows<Element> two_blocks[2], *rows = two_blocks, *next = two_blocks + 1;
    find_rows(batch, first_head, chunk_of(keys, keys.begin), *rows);
    for (int64_t begin = keys.begin; begin < keys.end; begin += plan_.chunk_keys) {
      const KeyRange chunk = chunk_of(keys, begin), next_chunk = chunk_of(keys, chunk.end);
      if (plan_.shared_angles) {
        rotation.first_angle = chunk.begin;
        tabulate_angles(rotation, chunk.begin, chunk.end);
      }
      for (int64_t i = 0; i < num_heads; ++i) {
        const GroupTile tile = tile_at(memory + i * plan_.head_size());
        for (int64_t block = chunk.begin; block < chunk.end; block += plan_.block_keys) {
          if (block + plan_.block_keys < chunk.end) {
            find_rows(batch, first_head + i, {block + plan_.block_keys, chunk.end}, *next);
          } else if (i + 1 < num_heads) {
            find_rows(batch, first_head + i + 1, chunk, *next);
          } else {
            find_rows(batch, first_head, next_chunk, *next);
          }
          LookAhead<Element> ahead_v(rows->v, rows->count, p_.head_dim_v);
          if (plan_.rotates_keys) {
            rotate_block(rotation, *rows, reinterpret_cast<Storage*>(rotated), ahead_v);
          }
          LookAhead<Element> ahead_k(next->k, next->count, p_.head_dim);
          attend_block<Element, Dot>(tile, *rows, p_.softcap, ahead_v, ahead_k);
          std::swap(rows, next);
        }
      }
    }
    for (int64_t i = 0; i < num_heads; ++i) {
      store_part(tile_at(memory + i * plan_.head_size()), part(batch, first_head + i, split));
    }
  }

  KeyRange chunk_of(KeyRange keys, int64_t begin) const {
    return {begin, std::min(begin + plan_.chunk_keys, keys.end)};
  }

  GroupTile tile_at(float* memory) const {
    GroupTile tile;
    tile.num_queries = plan_.num_queries;
    tile.dim = p_.head_dim;
    tile.dim_v = p_.head_dim_v;
    tile.stride_q = plan_.stride_q;
    tile.stride_o = plan_.stride_o;
    tile.q = memory;
    tile.s = tile.q + plan_.q_size;
    tile.acc_o = tile.s + plan_.s_size;
    tile.state = reinterpret_cast<QueryState*>(tile.acc_o + plan_.o_size);
    return tile;
  }

  // Queries rotated, in words; nothing seen yet.
  void start_queries(int64_t batch, int64_t kv_head, const GroupTile& tile) const {
    const int64_t group = p_.num_heads_q / p_.num_heads_kv;
    const RotaryRows rotation =
        p_.rotary.rotary_dim > 0 ? query_rotation(p_, batch, kv_head, 1.0f) : RotaryRows{};
    const VisibleKeys visible(p_, batch);
    std::memset(tile.q, 0, static_cast<uint64_t>(plan_.q_size) * sizeof(float));
    std::memset(tile.acc_o, 0, static_cast<uint64_t>(plan_.o_size) * sizeof(float));
    for (int64_t query = 0; query < tile.num_queries; ++query) {
      const int64_t head = kv_head * group + query / p_.seqlen_q, row = query % p_.seqlen_q;
      const auto* from = static_cast<const Storage*>(p_.q) + batch * p_.stride_q_batch +
                         head * p_.stride_q_head + row * p_.stride_q_row;
      auto* to = reinterpret_cast<typename Operand::Storage*>(tile.q + query * tile.stride_q);
      if (p_.rotary.rotary_dim > 0) {
        copy_row<Element, Operand>(rotation, row, from, to, p_.head_dim);
      } else {
        copy_row<Element, Operand>(NoPosition{}, row, from, to, p_.head_dim);
      }
      QueryState& state = tile.state[query];
      state.visible = visible.of_query(row);
      state.softmax.start(0, broadcast(scale_of_row(p_, batch, head, row)), p_.softcap);
    }
  }

  // The first block of `keys`.
  void find_rows(int64_t batch, int64_t kv_head, KeyRange keys, BlockRows<Element>& rows) const {
    const int64_t begin = rows.begin = keys.begin;
    rows.count = std::clamp<int64_t>(keys.end - begin, 0, plan_.block_keys);
    if (rows.count == 0) return;
    const auto k = cached_keys<Element>(p_, batch, kv_head);
    const auto v = cached_values<Element>(p_, batch, kv_head);
    k.for_rows(begin, begin + rows.count,
               [&](int64_t key, const Storage* row) { rows.k[key - begin] = row; });
    v.for_rows(begin, begin + rows.count,
               [&](int64_t key, const Storage* row) { rows.v[key - begin] = row; });
    const auto* const zeros = reinterpret_cast<const Storage*>(zeros_.data());
    for (int64_t i = rows.count; i <= kDecodeKeys; ++i) rows.v[i] = zeros;
    repeat_last_key(rows);
  }

  static void repeat_last_key(BlockRows<Element>& rows) {
    for (int64_t i = rows.count; i < kDecodeKeys; ++i) rows.k[i] = rows.k[rows.count - 1];
  }

  // Meanwhile the values of the block are asked for.
  void rotate_block(const RotaryRows& rotation, BlockRows<Element>& rows, Storage* rotated,
                    LookAhead<Element>& ahead_v) const {
    const RotaryRows own = rotation;  // a copy: a store could change what a reference leads to
    for (int64_t i = 0; i < rows.count; ++i, rotated += plan_.row_stride) {
      for (int64_t line = 0; line < plan_.row_lines; ++line) ahead_v.template ask<1>();
      rotate_row<Element, Element>(own, rows.begin + i, rows.k[i], rotated, p_.head_dim);
      rows.k[i] = rotated;
    }
    repeat_last_key(rows);
  }

  // A part is acc_o, then row_max and row_sum of each query.
  void store_part(const GroupTile& tile, float* part) const {
    std::memcpy(part, tile.acc_o, static_cast<uint64_t>(plan_.o_size) * sizeof(float));
    part += plan_.o_size;
    for (int64_t query = 0; query < tile.num_queries; ++query) {
      const Softmax<1>& softmax = tile.state[query].softmax;
      alignas(64) float maxima[kLanes];
      store(maxima, softmax.row_max[0]);
      part[query] = maxima[0];
      part[round_up(tile.num_queries, kLanes) + query] = sum_lanes(softmax.row_sum[0]);
    }
  }

  void merge_splits(int64_t batch, int64_t kv_head) const {
    int64_t num_splits = 0;
    while (num_splits < plan_.max_splits && !keys_of_split(batch, num_splits).empty()) ++num_splits;
    for (int64_t query = 0; query < plan_.num_queries; ++query) {
      merge_query(batch, kv_head, query, num_splits);
    }
  }

  void merge_query(int64_t batch, int64_t kv_head, int64_t query, int64_t num_splits) const {
    const float* const parts = part(batch, kv_head, 0);
    const float* const maxima = parts + plan_.o_size + query;
    const float* const sums = maxima + round_up(plan_.num_queries, kLanes);
    const int64_t stride = plan_.part_size();
    const int64_t group = p_.num_heads_q / p_.num_heads_kv;
    const int64_t head = kv_head * group + query / p_.seqlen_q, row = query % p_.seqlen_q;
    const float scale = scale_of_row(p_, batch, head, row);
    float row_max = -kInfinity;  // the largest; NaN if one is
    for (int64_t split = 0; split < num_splits; ++split) {
      if (!(maxima[split * stride] <= row_max)) row_max = maxima[split * stride];
    }
    const auto weight = [&](int64_t split) {
      return rescale(broadcast(row_max), broadcast(maxima[split * stride]),
                     scale_to_log2(broadcast(scale), p_.softcap));
    };
    const auto is_empty = [&](int64_t split) { return maxima[split * stride] == -kInfinity; };
    Vec sum = zero();
    for (int64_t split = 0; split < num_splits; ++split) {
      if (!is_empty(split)) sum = fma(weight(split), broadcast(sums[split * stride]), sum);
    }
    const Vec inverse = select(equal(sum, zero()), zero(), broadcast(1.0f) / sum);
    auto* out = static_cast<Storage*>(p_.out) + batch * p_.stride_out_batch +
                head * p_.stride_out_head + row * p_.stride_out_row;
    constexpr int64_t kGroup = kLanes * Dot::kDepth;
    for (int64_t channel = 0; channel < p_.head_dim_v; channel += kGroup) {
      Vec acc_o[Dot::kDepth];
      for (Vec& acc : acc_o) acc = zero();
      for (int64_t split = 0; split < num_splits; ++split) {
        if (is_empty(split)) continue;
        const float* from = parts + split * stride + query * plan_.stride_o + channel;
        for (int i = 0; i < Dot::kDepth; ++i) {
          acc_o[i] = fma(weight(split), load(from + i * kLanes), acc_o[i]);
        }
      }
      Dot::in_order(acc_o);
      for (int i = 0; i < Dot::kDepth; ++i) {
        const int64_t rest = p_.head_dim_v - channel - i * kLanes;
        if (rest <= 0) break;
        store_some<Element, Element>(out + channel + i * kLanes, acc_o[i] * inverse,
                                     static_cast<int>(std::min<int64_t>(rest, kLanes)));
      }
    }
    float total[kLanes];
    store(total, sum);
    p_.lse[(batch * p_.num_heads_q + head) * p_.head_rows_q() + row] =
        RowSoftmax{row_max, total[0]}.lse(scale, p_.softcap);
  }

  const AttentionDecodeParams& p_;
  DecodePlan<Dot> plan_;
  Scratch tiles_, parts_, zeros_;
};

}  // namespace drope::DROPE_ISA
