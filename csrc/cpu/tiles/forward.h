// Attention forward on tiles:
//   tabulate the angles that all heads of a batch row rotate by
//   pack k, rotated, and v once per kv head
//   for each chunk of queries: pack q, rotated
//     for each group of keys that stays in the L2 cache, for each 32 queries of the chunk,
//       for each 64 keys: scores, mask, softmax update, accumulate      (forward_pipeline.h,
//       forward_item.h)
//     divide by the row sums, store out, lse and what backward needs of the softmax
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention_cpu.h"
#include "cpu/parallel.h"
#include "cpu/rotation_angles.h"
#include "cpu/scratch.h"
#include "cpu/store_queries.h"
#include "cpu/tiles/forward_pipeline.h"

namespace drope::DROPE_ISA {

// Sizes of a forward call. None of them changes a number of its results.
template <int kDim>
struct ForwardPlan {
  static constexpr int64_t kSteps = kDim / kStep, kChannelTiles = kDim / kLanes;
  static constexpr int64_t kMaxChunkTiles = 32;  // 1024 queries: with as many keys, 2 MiB of L2
  static constexpr int64_t kMinChunkTiles = 4;
  static constexpr int64_t kKeysInCache = 1024;
  static constexpr int64_t kPackedAtATime = 128;     // keys of a packing task
  static constexpr int64_t kPackedFloats = 8 << 20;  // bound on several heads packed together
  static constexpr int64_t kTasksPerThread = 4;      // so that the last one ends near the others
  static constexpr double kFlopsPerThread = 2e7;     // less work is not worth a wake-up

  int64_t padded_keys;      // of a packed head
  int64_t k_size, v_size;   // floats of a packed head
  int64_t num_query_tiles;  // per query head
  int64_t chunk_tiles, num_chunks;
  int64_t q_size, o_size, worker_size;  // floats of a chunk
  int num_threads;
  int64_t heads_at_a_time;

  ForwardPlan(const AttentionForwardParams& p, const CpuOptions& options) {
    const int64_t max_keys = max_packed_keys(p);
    // Items begin at multiples of kStep and may reach past the last of them.
    padded_keys = round_up(max_keys, kStep) + kItemKeys - kStep;
    k_size = padded_keys / kTileRows * kSteps * kTile;
    v_size = padded_keys / kStep * kChannelTiles * kTile;
    num_query_tiles = (p.seqlen_q + kItemQueries - 1) / kItemQueries;

    const double flops = 2.0 * static_cast<double>(p.batch * p.num_heads_q * p.seqlen_q) *
                         static_cast<double>(max_keys * (p.head_dim + p.head_dim_v));
    num_threads = static_cast<int>(
        std::clamp(flops / kFlopsPerThread, 1.0, static_cast<double>(options.num_threads)));
    const int64_t heads = std::max<int64_t>(1, p.batch * p.num_heads_kv);
    const int64_t fitting = std::max<int64_t>(1, kPackedFloats / (k_size + v_size));
    heads_at_a_time = num_threads == 1 ? 1 : std::min({2L * num_threads, heads, fitting});

    chunk_tiles = std::min(kMaxChunkTiles, num_query_tiles);
    const int64_t together = heads_at_a_time * (p.num_heads_q / p.num_heads_kv);
    while (num_threads > 1 && chunk_tiles > kMinChunkTiles &&
           together * ((num_query_tiles + chunk_tiles - 1) / chunk_tiles) <
               kTasksPerThread * num_threads) {
      chunk_tiles = (chunk_tiles + 1) / 2;
    }
    num_chunks = (num_query_tiles + chunk_tiles - 1) / std::max<int64_t>(chunk_tiles, 1);
    q_size = chunk_tiles * 2 * kSteps * kTile;
    o_size = chunk_tiles * 2 * kChannelTiles * kTile;
    worker_size = ItemScratch::kFloats + q_size + o_size +
                  chunk_tiles * static_cast<int64_t>(sizeof(QueryState) / sizeof(float));
  }
};

template <int kDim>
class Forward {
  using Plan = ForwardPlan<kDim>;
  using Storage = BFloat16::Storage;

 public:
  Forward(const AttentionForwardParams& params, const CpuOptions& options)
      : p_(params),
        plan_(params, options),
        heads_(plan_.heads_at_a_time * (plan_.k_size + plan_.v_size)),
        workers_(plan_.num_threads * plan_.worker_size),
        angles_(params, plan_.heads_at_a_time) {}

  void run() {
    const int64_t num_heads = p_.batch * p_.num_heads_kv;
    const int64_t num_blocks =
        (plan_.padded_keys + Plan::kPackedAtATime - 1) / Plan::kPackedAtATime;
    const int64_t group = p_.num_heads_q / p_.num_heads_kv;
    for (int64_t first = 0; first < num_heads; first += plan_.heads_at_a_time) {
      const int64_t count = std::min(plan_.heads_at_a_time, num_heads - first);
      angles_.tabulate(first, count, plan_.num_threads);
      parallel_for(plan_.num_threads, count * num_blocks, [&](int64_t task, int) {
        pack_keys(head_at(first, task % count), task / count * Plan::kPackedAtATime);
      });
      // The last chunks first: with a causal mask they are the longest.
      parallel_for(plan_.num_threads, count * group * plan_.num_chunks,
                   [&](int64_t task, int worker) {
                     const int64_t chunk = plan_.num_chunks - 1 - task / (count * group);
                     const int64_t head = task % (count * group);
                     attend_chunk(head_at(first, head / group), head % group, chunk, worker);
                   });
    }
  }

 private:
  struct Head {
    int64_t batch, kv_head;
    KeyRange keys;  // that are packed
    float *k, *v;
  };

  Head head_at(int64_t first, int64_t slot) const {
    const int64_t batch = (first + slot) / p_.num_heads_kv;
    float* k = heads_.data() + slot * (plan_.k_size + plan_.v_size);
    return {batch, (first + slot) % p_.num_heads_kv, packed_keys(p_, batch), k, k + plan_.k_size};
  }

  void pack_keys(const Head& head, int64_t begin) const {
    const int64_t end = std::min(begin + Plan::kPackedAtATime, plan_.padded_keys);
    const Matrix<BFloat16> k{static_cast<const Storage*>(p_.k) + head.batch * p_.stride_k_batch +
                                 head.kv_head * p_.stride_k_head,
                             p_.stride_k_row, head.keys.end, p_.head_dim};
    // Values that no query sees are packed as 0: their probability is 0, they may be NaN.
    const KeyRange seen = visible_to_any(p_, head.batch);
    const Matrix<BFloat16> v{static_cast<const Storage*>(p_.v) + head.batch * p_.stride_v_batch +
                                 head.kv_head * p_.stride_v_head + seen.begin * p_.stride_v_row,
                             p_.stride_v_row, seen.end - seen.begin, p_.head_dim_v};
    const bool rotates = p_.rotary.rotary_dim > 0;
    const RotaryRows rotation =
        rotates ? angles_.template of_keys<BFloat16>(head.batch, head.kv_head) : RotaryRows{};
    for (int64_t key = begin; key < end; key += kTileRows) {
      float* tiles = head.k + key / kTileRows * Plan::kSteps * kTile;
      if (rotates) {
        pack_rows(rotation, k, head.keys.begin + key, Plan::kSteps, tiles);
      } else {
        pack_rows(NoPosition{}, k, head.keys.begin + key, Plan::kSteps, tiles);
      }
    }
    for (int64_t key = begin; key < end; key += kStep) {
      pack_channels(v, head.keys.begin + key - seen.begin, Plan::kChannelTiles,
                    head.v + key / kStep * Plan::kChannelTiles * kTile);
    }
  }

  // Working memory of a chunk of queries.
  struct Chunk {
    const Head& head;
    int64_t query_head, first_query, num_tiles;
    float *items, *q, *acc_o;
    QueryState* states;
    QueryRange ranges[Plan::kMaxChunkTiles];

    // The first key of a tile's items, counted from the first packed one.
    int64_t first_key(int64_t tile) const { return ranges[tile].any.begin / kStep * kStep; }
  };

  void attend_chunk(const Head& head, int64_t group_head, int64_t index, int worker) const {
    float* memory = workers_.data() + worker * plan_.worker_size;
    const int64_t first_tile = index * plan_.chunk_tiles;
    Chunk chunk{
        head,
        head.kv_head * (p_.num_heads_q / p_.num_heads_kv) + group_head,
        first_tile * kItemQueries,
        std::min(plan_.chunk_tiles, plan_.num_query_tiles - first_tile),
        memory,
        memory + ItemScratch::kFloats,
        memory + ItemScratch::kFloats + plan_.q_size,
        reinterpret_cast<QueryState*>(memory + ItemScratch::kFloats + plan_.q_size + plan_.o_size),
        {}};
    for (int64_t tile = 0; tile < chunk.num_tiles; ++tile) load_queries(chunk, tile);
    const Tiles tiles;
    attend_tiles(chunk, tiles);
  }

  void load_queries(Chunk& chunk, int64_t tile) const {
    const int64_t batch = chunk.head.batch, query = chunk.first_query + tile * kItemQueries;
    const Matrix<BFloat16> q{static_cast<const Storage*>(p_.q) + batch * p_.stride_q_batch +
                                 chunk.query_head * p_.stride_q_head,
                             p_.stride_q_row, p_.seqlen_q, p_.head_dim};
    QueryState& state = chunk.states[tile];
    float* packed = chunk.q + tile * 2 * Plan::kSteps * kTile;
    for (int c = 0; c < 2; ++c, packed += Plan::kSteps * kTile) {
      const int64_t row = query + c * kTileRows;
      if (p_.rotary.rotary_dim > 0) {
        pack_columns(
            angles_.template of_queries<BFloat16>(batch, chunk.query_head, chunk.head.kv_head), q,
            row, Plan::kSteps, packed);
      } else {
        pack_columns(NoPosition{}, q, row, Plan::kSteps, packed);
      }
      store(state.reference + c * kLanes, broadcast(-kInfinity));
      store(state.row_sum + c * kLanes, zero());
      store(state.scale_log2 + c * kLanes,
            scale_to_log2(query_scales(p_, batch, chunk.query_head, row), 0.0f));
    }
    chunk.ranges[tile] = QueryRange(p_, batch, query, chunk.head.keys.begin);
  }

  void attend_tiles(const Chunk& chunk, const Tiles& tiles) const {
    const auto finish = [&](const Item& item) { store_tile(chunk, item.query_tile); };
    Pipeline<kDim, decltype(finish)> pipeline(tiles, chunk.items, chunk.ranges, finish);
    int64_t begin = plan_.padded_keys, end = 0;
    for (int64_t tile = 0; tile < chunk.num_tiles; ++tile) {
      const KeyRange any = chunk.ranges[tile].any;
      if (any.empty()) {
        clear_tiles(acc_o(chunk, tile), 2 * Plan::kChannelTiles);
        store_tile(chunk, tile);
        continue;
      }
      begin = std::min(begin, chunk.first_key(tile));
      end = std::max(end, any.end);
    }
    for (int64_t near = begin; near < end; near += Plan::kKeysInCache) {
      for (int64_t tile = 0; tile < chunk.num_tiles; ++tile) {
        push_items(chunk, tile, {near, near + Plan::kKeysInCache}, pipeline);
      }
    }
    pipeline.drain();
  }

  // The items of a tile that begin among keys `near`.
  template <class Items>
  DROPE_INLINE void push_items(const Chunk& chunk, int64_t tile, KeyRange near,
                               Items& pipeline) const {
    const QueryRange& range = chunk.ranges[tile];
    if (range.any.empty()) return;
    const int64_t first = chunk.first_key(tile);
    const int64_t skipped = std::max<int64_t>(0, near.begin - first);
    for (int64_t key = first + round_up(skipped, kItemKeys);
         key < std::min(range.any.end, near.end); key += kItemKeys) {
      Item item;
      item.q = chunk.q + tile * 2 * Plan::kSteps * kTile;
      item.k = chunk.head.k + key / kTileRows * Plan::kSteps * kTile;
      item.v = chunk.head.v + key / kStep * Plan::kChannelTiles * kTile;
      item.acc_o = acc_o(chunk, tile);
      item.state = &chunk.states[tile];
      item.query_tile = tile;
      item.first_key = key;
      item.half = range.any.end - key <= kStep;
      item.masked = key < range.all.begin || key + (item.half ? kStep : kItemKeys) > range.all.end;
      item.first = key == first;
      item.last = key + kItemKeys >= range.any.end;
      pipeline.push(item);
    }
  }

  float* acc_o(const Chunk& chunk, int64_t tile) const {
    return chunk.acc_o + tile * 2 * Plan::kChannelTiles * kTile;
  }

  void store_tile(const Chunk& chunk, int64_t tile) const {
    const QueryState& state = chunk.states[tile];
    for (int c = 0; c < 2; ++c) {
      const int64_t query = chunk.first_query + tile * kItemQueries + c * kTileRows;
      if (query >= p_.seqlen_q) break;
      store_queries<BFloat16>(p_, {chunk.head.batch, chunk.query_head, query},
                              load(state.reference + c * kLanes), load(state.row_sum + c * kLanes),
                              acc_o(chunk, tile) + c * kTile, kLanes, 2 * kTile);
    }
  }

  const AttentionForwardParams& p_;
  Plan plan_;
  Scratch heads_, workers_;
  RotationAngles angles_;
};

inline void forward_on_tiles(const AttentionForwardParams& params, const CpuOptions& options) {
  switch (round_up(std::max(params.head_dim, params.head_dim_v), kStep)) {
    case 32:
      return Forward<32>(params, options).run();
    case 64:
      return Forward<64>(params, options).run();
    case 96:
      return Forward<96>(params, options).run();
    default:
      return Forward<128>(params, options).run();
  }
}

}  // namespace drope::DROPE_ISA
