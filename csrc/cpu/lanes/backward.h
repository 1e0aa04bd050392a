// Attention backward, in one pass over the tiles of (query, key), without atomics.
//
//   for each kv head: pack k and v
//   for each part of a head's query tiles: clear its dK and dV; for each group of its tiles
//     load q and dO; for each kv block, for each tile: the five products; store dQ
//   for each kv head: add its parts in order, undo the rotation of dK, store dK and dV
#pragma once

#include "cpu/attention_cpu.h"
#include "cpu/lanes/backward_queries.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace drope::DROPE_ISA {

inline constexpr int64_t kMaxTilesPerGroup = 8;

template <class Dot>
DROPE_INLINE BackwardTile<Dot> empty_tile(const AttentionBackwardParams& p) {
  BackwardTile<Dot> tile{};
  tile.head_dim = p.head_dim;
  tile.head_dim_v = p.head_dim_v;
  tile.softcap = p.softcap;
  return tile;
}

// Sizes of a backward call. num_parts is a function of the shape alone, so that gradients are the
// same numbers on any number of threads.
template <class Dot>
struct BackwardPlan {
  int64_t max_keys;                      // that a head packs, a multiple of the kv block
  int64_t k_size, v_size, channel_size;  // floats of a packed head
  int64_t grad_k_size, grad_v_size;      // floats of one part's gradients
  int64_t tile_size;                     // floats of a tile
  int64_t tiles_per_group;               // that share a kv block while it is in the L2 cache
  int64_t groups_per_head;               // of a query head
  int64_t num_parts;                     // of a kv head's groups; each has dK and dV of its own
  int num_threads;
  int64_t heads_at_a_time;

  BackwardPlan(const AttentionBackwardParams& p, const CpuOptions& options) {
    max_keys = 0;
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      const KeyRange keys = visible_to_any(p, batch);
      max_keys = std::max(max_keys, keys.end - keys.begin);
    }
    max_keys = round_up(max_keys, kBlockKv);
    k_size = max_keys * words<Dot>(p.head_dim);
    v_size = max_keys * words<Dot>(p.head_dim_v);
    channel_size = words<Dot>(max_keys) * round_up(p.head_dim, kRows);
    grad_k_size = max_keys * round_up(p.head_dim, kLanes);
    grad_v_size = max_keys * round_up(p.head_dim_v, kLanes);
    tile_size = empty_tile<Dot>(p).place(nullptr);
    tiles_per_group = std::clamp<int64_t>(kGroupFloats / tile_size, 1, kMaxTilesPerGroup);
    groups_per_head = (p.seqlen_q + tiles_per_group * kBlockQ - 1) / (tiles_per_group * kBlockQ);

    const int64_t heads = std::max<int64_t>(1, p.batch * p.num_heads_kv);
    const int64_t head_groups = p.num_heads_q / p.num_heads_kv * groups_per_head;
    const int64_t wanted = std::min((kWantedTasks + heads - 1) / heads, kMaxParts);
    num_parts = std::max<int64_t>(1, std::min(wanted, head_groups / kGroupsPerPart));

    const double flops = 5.0 * static_cast<double>(p.batch * p.num_heads_q * p.seqlen_q) *
                         static_cast<double>(max_keys * (p.head_dim + p.head_dim_v));
    num_threads = static_cast<int>(
        std::clamp(flops / kFlopsPerThread, 1.0, static_cast<double>(options.num_threads)));
    heads_at_a_time = std::min((num_threads + num_parts - 1) / num_parts, heads);
  }

  int64_t head_size() const {
    return k_size + v_size + channel_size + num_parts * (grad_k_size + grad_v_size);
  }

  int64_t worker_size() const { return tiles_per_group * tile_size + BackwardScores<Dot>::kFloats; }

  static constexpr int64_t kWantedTasks = 16;        // enough for that many threads
  static constexpr int64_t kMaxParts = 8;            // bound on the memory of one head
  static constexpr int64_t kGroupsPerPart = 2;       // fewer would not repay a part's clear and add
  static constexpr int64_t kGroupFloats = 64 << 10;  // 256 KiB of L2, which a kv block shares
  static constexpr double kFlopsPerThread = 2e6;     // less work is not worth a wake-up
};

template <class Element, class Dot>
class Backward {
  using Storage = typename Element::Storage;

 public:
  Backward(const AttentionBackwardParams& params, const CpuOptions& options)
      : p_(params),
        plan_(params, options),
        heads_(plan_.heads_at_a_time * plan_.head_size()),
        tiles_(plan_.num_threads * plan_.worker_size()) {
    // Padding channels are multiplied, never stored, and must not be NaN.
    std::memset(tiles_.data(), 0, sizeof(float) * plan_.num_threads * plan_.worker_size());
  }

  void run() const {
    const int64_t num_heads = p_.batch * p_.num_heads_kv;
    const int64_t num_blocks = plan_.max_keys / kBlockKv;
    const int64_t num_chunks = (p_.seqlen_kv + kBlockKv - 1) / kBlockKv;
    for (int64_t first = 0; first < num_heads; first += plan_.heads_at_a_time) {
      const int64_t count = std::min(plan_.heads_at_a_time, num_heads - first);
      const int threads = plan_.num_threads;
      parallel_for(threads, count * num_blocks, [&](int64_t task, int) {
        pack_block(head_at(first, task / num_blocks), task % num_blocks * kBlockKv);
      });
      parallel_for(threads, count * plan_.num_parts, [&](int64_t task, int worker) {
        differentiate_part(head_at(first, task / plan_.num_parts), task % plan_.num_parts, worker);
      });
      parallel_for(threads, count * num_chunks, [&](int64_t task, int) {
        const int64_t key = task % num_chunks * kBlockKv;
        store_keys(head_at(first, task / num_chunks), key, std::min(key + kBlockKv, p_.seqlen_kv));
      });
    }
  }

 private:
  struct Head {
    int64_t batch, kv_head;
    KeyRange keys;  // that are packed
    float* memory;
  };

  Head head_at(int64_t first, int64_t slot) const {
    const int64_t batch = (first + slot) / p_.num_heads_kv;
    return {batch, (first + slot) % p_.num_heads_kv, visible_to_any(p_, batch),
            heads_.data() + slot * plan_.head_size()};
  }

  BackwardHead arrays(const Head& head, int64_t part) const {
    float* k_channels = head.memory + plan_.k_size + plan_.v_size;
    float* grad_k =
        k_channels + plan_.channel_size + part * (plan_.grad_k_size + plan_.grad_v_size);
    return {head.memory, head.memory + plan_.k_size, k_channels, grad_k,
            grad_k + plan_.grad_k_size};
  }

  // Keys of a block, rounded up to what row panels are made of.
  int64_t block_keys(const Head& head, int64_t block) const {
    return std::min(kBlockKv, round_up(head.keys.end - head.keys.begin - block, kLanes));
  }

  void pack_block(const Head& head, int64_t block) const {
    const int64_t count = block_keys(head, block);
    if (count <= 0) return;
    const BackwardHead packed = arrays(head, 0);
    // Rows past the visible keys are packed as 0: they may be NaN, and their dS is 0.
    const Matrix<Element> k =
        only_rows(key_matrix<Element>(p_, head.batch, head.kv_head), head.keys);
    const Matrix<Element> v =
        only_rows(value_matrix<Element>(p_, head.batch, head.kv_head), head.keys);
    pack_row_panels<Dot>(NoPosition{}, k, block, count,
                         packed.k_rows + block * words<Dot>(p_.head_dim));
    pack_row_panels<Dot>(NoPosition{}, v, block, count,
                         packed.v_rows + block * words<Dot>(p_.head_dim_v));
    pack_channel_panels<Dot>(
        k, block, count, packed.k_channels + block / Dot::kDepth * round_up(p_.head_dim, kRows));
  }

  // Groups part, part + num_parts, ... of the tiles of all query heads of a kv head.
  void differentiate_part(const Head& head, int64_t part, int worker) const {
    const BackwardHead packed = arrays(head, part);
    std::memset(packed.grad_k, 0, sizeof(float) * (plan_.grad_k_size + plan_.grad_v_size));
    const int64_t group_heads = p_.num_heads_q / p_.num_heads_kv;
    for (int64_t i = part; i < group_heads * plan_.groups_per_head; i += plan_.num_parts) {
      const int64_t query_head = head.kv_head * group_heads + i / plan_.groups_per_head;
      const int64_t query = i % plan_.groups_per_head * plan_.tiles_per_group * kBlockQ;
      differentiate_group(head, packed, {head.batch, query_head, head.kv_head, query}, worker);
    }
  }

  void differentiate_group(const Head& head, const BackwardHead& packed, QueryRows rows,
                           int worker) const {
    float* memory = tiles_.data() + worker * plan_.worker_size();
    const BackwardScores<Dot> scores(memory);
    memory += scores.kFloats;
    BackwardTile<Dot> tiles[kMaxTilesPerGroup];
    const int64_t rest = (p_.seqlen_q - rows.first + kBlockQ - 1) / kBlockQ;
    const int64_t num_tiles = std::min(plan_.tiles_per_group, rest);
    const auto tile_rows = [&](int64_t i) {
      return QueryRows{rows.batch, rows.head, rows.kv_head, rows.first + i * kBlockQ};
    };
    KeyRange any{INT64_MAX, 0};
    for (int64_t i = 0; i < num_tiles; ++i) {
      tiles[i] = empty_tile<Dot>(p_);
      memory += tiles[i].place(memory);
      load_queries<Element>(p_, tile_rows(i), head.keys.begin, tiles[i]);
      any.begin = std::min(any.begin, tiles[i].range.any.begin);
      any.end = std::max(any.end, tiles[i].range.any.end);
    }
    for (int64_t block = any.begin / kBlockKv * kBlockKv; block < any.end; block += kBlockKv) {
      for (int64_t i = 0; i < num_tiles; ++i) {
        differentiate_block(tiles[i], packed, block, block_keys(head, block), scores);
      }
    }
    for (int64_t i = 0; i < num_tiles; ++i) store_queries<Element>(p_, tile_rows(i), tiles[i]);
  }

  void store_keys(const Head& head, int64_t begin, int64_t end) const {
    Storage* grad_k = static_cast<Storage*>(p_.grad_k) + head.batch * p_.stride_grad_k_batch +
                      head.kv_head * p_.stride_grad_k_head;
    Storage* grad_v = static_cast<Storage*>(p_.grad_v) + head.batch * p_.stride_grad_v_batch +
                      head.kv_head * p_.stride_grad_v_head;
    const RotaryRows rotation = undo_key_rotation(p_, head.batch, head.kv_head);
    for (int64_t key = begin; key < end; ++key) {
      Storage* grad_k_row = grad_k + key * p_.stride_grad_k_row;
      Storage* grad_v_row = grad_v + key * p_.stride_grad_v_row;
      if (key < head.keys.begin || key >= head.keys.end) {
        std::memset(grad_k_row, 0, sizeof(Storage) * p_.head_dim);
        std::memset(grad_v_row, 0, sizeof(Storage) * p_.head_dim_v);
        continue;
      }
      const int64_t row = key - head.keys.begin;
      const BackwardHead sum = arrays(head, 0);
      float* sum_k = sum.grad_k + row * round_up(p_.head_dim, kLanes);
      float* sum_v = sum.grad_v + row * round_up(p_.head_dim_v, kLanes);
      for (int64_t part = 1; part < plan_.num_parts; ++part) {
        const int64_t offset = part * (plan_.grad_k_size + plan_.grad_v_size);
        add_row(sum_k + offset, round_up(p_.head_dim, kLanes), sum_k);
        add_row(sum_v + offset, round_up(p_.head_dim_v, kLanes), sum_v);
      }
      store_unrotated<Element>(rotation, key, sum_k, p_.head_dim, grad_k_row);
      copy_row<Float32, Element>(NoPosition{}, key, sum_v, grad_v_row, p_.head_dim_v);
    }
  }

  static DROPE_INLINE void add_row(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(to + i) + load(from + i));
  }

  const AttentionBackwardParams& p_;
  BackwardPlan<Dot> plan_;
  Scratch heads_, tiles_;
};

inline void backward(const AttentionBackwardParams& params, const CpuOptions& options) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Backward<Float32, DotFloat32>(params, options).run();
    case DType::kFloat16:
      return Backward<Float16, DotFloat32>(params, options).run();
    case DType::kBFloat16:
      return Backward<BFloat16, DotForBFloat16>(params, options).run();
  }
}

}  // namespace drope::DROPE_ISA
