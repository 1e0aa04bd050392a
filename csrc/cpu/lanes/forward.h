// Attention forward:
//   tabulate the angles that all heads of a batch row rotate by
//   pack k, rotated, and v once per kv head
//   for each tile of queries: pack q, rotated
//     for each kv block: scores, mask, softmax update, accumulate      (attend.h)
//     divide by the row sums, store out, lse and what backward needs of the softmax
#pragma once

#include "cpu/attention_cpu.h"
#include "cpu/lanes/attend.h"
#include "cpu/lanes/few_queries.h"
#include "cpu/parallel.h"
#include "cpu/rotation_angles.h"
#include "cpu/scratch.h"
#include "cpu/store_queries.h"

namespace drope::DROPE_ISA {

// Normalises a tile and stores the rows that exist: out (query, channel) from acc_o (channel,
// query).
template <class Element, int kVecCount>
void store_tile(const AttentionForwardParams& p, int64_t batch, int64_t head, int64_t first_query,
                const Softmax<kVecCount>& softmax, const float* acc_o) {
  constexpr int64_t kQueries = kVecCount * kLanes;
  for (int v = 0; v < kVecCount; ++v) {
    store_queries<Element>(p, {batch, head, first_query + v * kLanes}, softmax.row_max[v],
                           softmax.row_sum[v], acc_o + v * kLanes, kQueries, kLanes * kQueries);
  }
}

// Sizes of a forward call that do not change from head to head.
template <class Dot>
struct ForwardPlan {
  int64_t k_words, v_dim;          // of PackedHead
  int64_t max_keys;                // the most keys that a head packs
  int64_t k_size, v_size;          // floats of a packed head
  int64_t q_size, p_size, o_size;  // floats of a tile
  int64_t num_tiles;               // per query head
  int num_threads;
  int64_t heads_at_a_time;  // kv heads packed together, so that every thread finds work

  ForwardPlan(const AttentionForwardParams& p, const CpuOptions& options) {
    constexpr int64_t kQueries = kMaxVecs * kLanes;
    k_words = words<Dot>(p.head_dim);
    v_dim = round_up(p.head_dim_v, kRows);
    max_keys = max_packed_keys(p);
    k_size = round_up(max_keys, kLanes) * k_words;
    v_size = round_up(max_keys, kRows) * v_dim;
    q_size = kQueries * k_words;
    p_size = kQueries * kBlockKv;
    o_size = kQueries * round_up(p.head_dim_v, kLanes);
    num_tiles = (p.seqlen_q + kQueries - 1) / kQueries;

    const double flops = 2.0 * static_cast<double>(p.batch * p.num_heads_q * p.seqlen_q) *
                         static_cast<double>(max_keys * (p.head_dim + p.head_dim_v));
    num_threads = std::max(
        1, std::min(options.num_threads, static_cast<int>(std::min(flops / kFlopsPerThread, 1e6))));
    const int64_t heads = p.batch * p.num_heads_kv;
    heads_at_a_time = num_threads == 1 ? 1 : 2 * num_threads;
    const int64_t fitting = kPackedFloats / std::max<int64_t>(k_size + v_size, 1);
    heads_at_a_time = std::max<int64_t>(1, std::min({heads_at_a_time, heads, fitting}));
  }

  static constexpr double kFlopsPerThread = 2e6;      // less work than this is not worth a wake-up
  static constexpr int64_t kPackedFloats = 16 << 20;  // bound on several heads packed together
};

template <class Element, class Dot>
class Forward {
  using Storage = typename Element::Storage;

 public:
  Forward(const AttentionForwardParams& params, const CpuOptions& options)
      : p_(params),
        plan_(params, options),
        heads_(plan_.heads_at_a_time * (plan_.k_size + plan_.v_size)),
        tiles_(plan_.num_threads * (plan_.q_size + plan_.p_size + plan_.o_size)),
        angles_(params, plan_.heads_at_a_time) {}

  void run() {
    const int64_t num_blocks = (plan_.max_keys + kBlockKv - 1) / kBlockKv;
    const int64_t tiles_per_head = p_.num_heads_q / p_.num_heads_kv * plan_.num_tiles;
    const int64_t num_heads = p_.batch * p_.num_heads_kv;
    for (int64_t first = 0; first < num_heads; first += plan_.heads_at_a_time) {
      const int64_t count = std::min(plan_.heads_at_a_time, num_heads - first);
      angles_.tabulate(first, count, plan_.num_threads);
      parallel_for(plan_.num_threads, count * num_blocks, [&](int64_t task, int) {
        pack_block(first, task / num_blocks, task % num_blocks * kBlockKv);
      });
      parallel_for(plan_.num_threads, count * tiles_per_head, [&](int64_t task, int worker) {
        const int64_t tile = task % tiles_per_head;
        // The last tile first: with a causal mask it is the longest.
        attend_tile(first, task / tiles_per_head, tile / plan_.num_tiles,
                    plan_.num_tiles - 1 - tile % plan_.num_tiles, worker);
      });
    }
  }

 private:
  PackedHead packed_head(int64_t batch, int64_t slot) const {
    const KeyRange keys = packed_keys(p_, batch);
    const float* k = heads_.data() + slot * (plan_.k_size + plan_.v_size);
    return {k, k + plan_.k_size, keys.begin, keys.end - keys.begin, plan_.k_words, plan_.v_dim};
  }

  void pack_block(int64_t first_head, int64_t slot, int64_t block) const {
    const int64_t batch = (first_head + slot) / p_.num_heads_kv;
    const int64_t kv_head = (first_head + slot) % p_.num_heads_kv;
    const PackedHead head = packed_head(batch, slot);
    if (block >= head.num_keys) return;
    const int64_t count = head.block_keys(block);

    float* k_panels = const_cast<float*>(head.k) + block * head.k_words;
    const Matrix<Element> k{
        static_cast<const Storage*>(p_.k) + batch * p_.stride_k_batch + kv_head * p_.stride_k_head,
        p_.stride_k_row, p_.seqlen_kv, p_.head_dim};
    if (p_.rotary.rotary_dim > 0) {
      const RotaryRows rotation = angles_.of_keys<Element>(batch, kv_head);
      pack_row_panels<Dot>(rotation, k, head.origin + block, count, k_panels);
    } else {
      pack_row_panels<Dot>(NoPosition{}, k, head.origin + block, count, k_panels);
    }

    // Values that no query sees are packed as 0: their probability is 0, they may be NaN.
    const KeyRange seen = visible_to_any(p_, batch);
    const Matrix<Element> v{static_cast<const Storage*>(p_.v) + batch * p_.stride_v_batch +
                                kv_head * p_.stride_v_head + seen.begin * p_.stride_v_row,
                            p_.stride_v_row, seen.end - seen.begin, p_.head_dim_v};
    pack_channel_panels<Dot>(v, head.origin + block - seen.begin, count,
                             const_cast<float*>(head.v) + block / Dot::kDepth * head.v_dim);
  }

  void attend_tile(int64_t first_head, int64_t slot, int64_t group_head, int64_t tile,
                   int worker) const {
    const int64_t query = tile * kMaxVecs * kLanes;
    const int64_t num_vecs = (p_.seqlen_q - query + kLanes - 1) / kLanes;
    if (num_vecs == 1) {
      attend_queries<1>(first_head, slot, group_head, query, worker);
    } else if (num_vecs == 2 || kMaxVecs == 2) {
      attend_queries<2>(first_head, slot, group_head, query, worker);
    } else {
      attend_queries<kMaxVecs>(first_head, slot, group_head, query, worker);
    }
  }

  template <int kVecCount>
  void attend_queries(int64_t first_head, int64_t slot, int64_t group_head, int64_t query,
                      int worker) const {
    const int64_t batch = (first_head + slot) / p_.num_heads_kv;
    const int64_t kv_head = (first_head + slot) % p_.num_heads_kv;
    const int64_t head = kv_head * (p_.num_heads_q / p_.num_heads_kv) + group_head;
    float* memory = tiles_.data() + worker * (plan_.q_size + plan_.p_size + plan_.o_size);
    const TileScratch tile{memory, memory + plan_.q_size, memory + plan_.q_size + plan_.p_size};
    pack_queries<kVecCount>(batch, head, kv_head, query, tile.q);

    const PackedHead packed = packed_head(batch, slot);
    const TileRange<kVecCount> range(p_, batch, query, packed.origin);
    Softmax<kVecCount> softmax;
    for (int v = 0; v < kVecCount; ++v) {
      softmax.start(v, query_scales(p_, batch, head, query + v * kLanes), p_.softcap);
    }
    attend<Dot>(packed, range, p_.softcap, softmax, tile);
    store_tile<Element>(p_, batch, head, query, softmax, tile.acc_o);
  }

  template <int kVecCount>
  void pack_queries(int64_t batch, int64_t head, int64_t kv_head, int64_t query,
                    float* packed) const {
    const Matrix<Element> q{
        static_cast<const Storage*>(p_.q) + batch * p_.stride_q_batch + head * p_.stride_q_head,
        p_.stride_q_row, p_.seqlen_q, p_.head_dim};
    if (p_.rotary.rotary_dim > 0) {
      const RotaryRows rotation = angles_.of_queries<Element>(batch, head, kv_head);
      pack_lanes<Dot, kVecCount>(rotation, q, query, packed);
    } else {
      pack_lanes<Dot, kVecCount>(NoPosition{}, q, query, packed);
    }
  }

  const AttentionForwardParams& p_;
  ForwardPlan<Dot> plan_;
  Scratch heads_, tiles_;
  RotationAngles angles_;
};

template <class Element, class Dot>
void forward_elements(const AttentionForwardParams& params, const CpuOptions& options) {
  if (has_few_queries(params)) return attend_few_queries<Element, Dot>(params, options);
  Forward<Element, Dot>(params, options).run();
}

inline void forward(const AttentionForwardParams& params, const CpuOptions& options) {
  switch (params.dtype) {
    case DType::kFloat32:
      return forward_elements<Float32, DotFloat32>(params, options);
    case DType::kFloat16:
      return forward_elements<Float16, DotFloat32>(params, options);
    case DType::kBFloat16:
      return forward_elements<BFloat16, DotForBFloat16>(params, options);
  }
}

}  // namespace drope::DROPE_ISA
