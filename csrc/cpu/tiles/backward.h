// Attention backward on tiles, in one pass over the blocks of (query, key), without atomics.
//
//   for each kv head: pack k and v
//   for each part of a head's query blocks: clear its dK and dV; for each group of its blocks
//     load q and dO; for each kv block, for each query block: the five products; store dQ
//   for each kv head: add its parts in order, undo the rotation of dK, store dK and dV
#pragma once

#include "cpu/attention_cpu.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/tiles/backward_queries.h"

namespace drope::DROPE_ISA {

// Query blocks that share a kv block while it is in the L2 cache, half of which they fill. On an
// Emerald Rapids (2 MiB of L2) at 128 channels 4 and 6 ran alike, 8 took 8 % longer, 10 took 24 %;
// at 64 channels 4 to 10 ran alike.
template <int kDim>
inline constexpr int64_t kBlocksPerGroup =
    std::min<int64_t>(16, (256 << 10) / (QueryBlock::kFloats * kDim));

// Sizes of a backward call. num_parts is a function of the shape alone, so that gradients are the
// same numbers on any number of threads.
struct BackwardPlan {
  int64_t max_keys;         // that a head packs, a multiple of kBlockKeys
  int64_t blocks_per_head;  // of a query head
  int64_t num_blocks;       // of a kv head
  int64_t num_parts;        // of a kv head's blocks; each has dK and dV of its own
  int num_threads;
  int64_t heads_at_a_time;

  BackwardPlan(const AttentionBackwardParams& p, const CpuOptions& options) {
    max_keys = 0;
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      const KeyRange keys = visible_to_any(p, batch);
      max_keys = std::max(max_keys, keys.end - keys.begin);
    }
    max_keys = round_up(max_keys, kBlockKeys);
    blocks_per_head = (p.seqlen_q + kBlockQueries - 1) / kBlockQueries;
    num_blocks = p.num_heads_q / p.num_heads_kv * blocks_per_head;

    const int64_t heads = std::max<int64_t>(1, p.batch * p.num_heads_kv);
    const int64_t wanted = std::min((kWantedTasks + heads - 1) / heads, kMaxParts);
    num_parts = std::max<int64_t>(1, std::min(wanted, num_blocks / kBlocksPerPart));

    const double flops = 5.0 * static_cast<double>(p.batch * p.num_heads_q * p.seqlen_q) *
                         static_cast<double>(max_keys * (p.head_dim + p.head_dim_v));
    num_threads = static_cast<int>(
        std::clamp(flops / kFlopsPerThread, 1.0, static_cast<double>(options.num_threads)));
    heads_at_a_time = std::min((num_threads + num_parts - 1) / num_parts, heads);
  }

  // The number of a part's query blocks, and the index of each. Parts take turns, every other time
  // in reverse: under a causal mask later blocks cost more.
  int64_t part_blocks(int64_t part) const {
    const int64_t rounds = num_blocks / num_parts;
    return rounds + (block_at(part, rounds) < num_blocks ? 1 : 0);
  }
  int64_t block_at(int64_t part, int64_t round) const {
    return round * num_parts + (round % 2 == 0 ? part : num_parts - 1 - part);
  }

  static constexpr int64_t kWantedTasks = 16;     // enough for that many threads
  static constexpr int64_t kMaxParts = 8;         // bound on the memory of one head
  static constexpr int64_t kBlocksPerPart = 8;    // fewer would share keys less
  static constexpr double kFlopsPerThread = 2e7;  // less work is not worth a wake-up
};

template <int kDim>
class Backward {
 public:
  Backward(const AttentionBackwardParams& params, const CpuOptions& options)
      : p_(params),
        plan_(params, options),
        heads_(plan_.heads_at_a_time * head_size()),
        blocks_(plan_.num_threads * kWorkerSize) {}

  void run() const {
    const int64_t num_heads = p_.batch * p_.num_heads_kv;
    const int64_t num_kv_blocks = plan_.max_keys / kBlockKeys;
    const int64_t num_chunks = (p_.seqlen_kv + kChunkKeys - 1) / kChunkKeys;
    for (int64_t first = 0; first < num_heads; first += plan_.heads_at_a_time) {
      const int64_t count = std::min(plan_.heads_at_a_time, num_heads - first);
      const int threads = plan_.num_threads;
      parallel_for(threads, count * num_kv_blocks, [&](int64_t task, int) {
        pack_keys(head_at(first, task / num_kv_blocks), task % num_kv_blocks * kBlockKeys);
      });
      parallel_for(threads, count * plan_.num_parts, [&](int64_t task, int worker) {
        differentiate_part(head_at(first, task / plan_.num_parts), task % plan_.num_parts, worker);
      });
      parallel_for(threads, count * num_chunks, [&](int64_t task, int) {
        const int64_t key = task % num_chunks * kChunkKeys;
        store_keys(head_at(first, task / num_chunks), key,
                   std::min(key + kChunkKeys, p_.seqlen_kv));
      });
    }
  }

 private:
  static constexpr int64_t kChunkKeys = 128;
  static constexpr int64_t kGroup = kBlocksPerGroup<kDim>;
  static constexpr int64_t kBlockSize = QueryBlock::kFloats * kDim;
  static constexpr int64_t kWorkerSize = kGroup * kBlockSize + BlockScores::kFloats;
  // Per key: three operands, then dK and dV of each part.
  static constexpr int64_t kOperandSize = kDim / 2, kGradSize = kDim;

  struct Head {
    int64_t batch, kv_head;
    KeyRange keys;  // that are packed
    float* memory;
  };

  int64_t head_size() const {
    return plan_.max_keys * (3 * kOperandSize + plan_.num_parts * 2 * kGradSize);
  }

  Head head_at(int64_t first, int64_t slot) const {
    const int64_t batch = (first + slot) / p_.num_heads_kv;
    return {batch, (first + slot) % p_.num_heads_kv, visible_to_any(p_, batch),
            heads_.data() + slot * head_size()};
  }

  float* grad_k(const Head& head, int64_t part) const {
    return head.memory + plan_.max_keys * (3 * kOperandSize + part * 2 * kGradSize);
  }
  float* grad_v(const Head& head, int64_t part) const {
    return grad_k(head, part) + plan_.max_keys * kGradSize;
  }

  void pack_keys(const Head& head, int64_t first) const {
    // Rows past the visible keys are packed as 0: they may be NaN, and their dS is 0.
    const Matrix<BFloat16> k =
        only_rows(key_matrix<BFloat16>(p_, head.batch, head.kv_head), head.keys);
    const Matrix<BFloat16> v =
        only_rows(value_matrix<BFloat16>(p_, head.batch, head.kv_head), head.keys);
    float* k_rows = head.memory + first * kOperandSize;
    float* v_rows = k_rows + plan_.max_keys * kOperandSize;
    float* k_channels = v_rows + plan_.max_keys * kOperandSize;
    for (int64_t key = 0; key < kBlockKeys; key += kTileRows) {
      const int64_t offset = key * kOperandSize;
      pack_rows(NoPosition{}, k, first + key, Channels<kDim>::kSteps, k_rows + offset);
      pack_rows(NoPosition{}, v, first + key, Channels<kDim>::kSteps, v_rows + offset);
      if (key % kStep == 0) {
        pack_channels(k, first + key, Channels<kDim>::kTiles, k_channels + offset);
      }
    }
  }

  KeyBlock keys_at(const Head& head, int64_t part, int64_t first) const {
    const float* k_rows = head.memory + first * kOperandSize;
    const int64_t operand = plan_.max_keys * kOperandSize, grad = first * kGradSize;
    return {first,
            k_rows,
            k_rows + operand,
            k_rows + 2 * operand,
            grad_k(head, part) + grad,
            grad_v(head, part) + grad};
  }

  QueryRows query_rows(const Head& head, int64_t q_block) const {
    const int64_t group_heads = p_.num_heads_q / p_.num_heads_kv;
    return {head.batch, head.kv_head * group_heads + q_block / plan_.blocks_per_head, head.kv_head,
            q_block % plan_.blocks_per_head * kBlockQueries};
  }

  void differentiate_part(const Head& head, int64_t part, int worker) const {
    std::memset(grad_k(head, part), 0, sizeof(float) * plan_.max_keys * 2 * kGradSize);
    const int64_t num_blocks = plan_.part_blocks(part);
    const Tiles tiles;
    for (int64_t round = 0; round < num_blocks; round += kGroup) {
      differentiate_group(tiles, head, part, round, std::min(kGroup, num_blocks - round),
                          blocks_.data() + worker * kWorkerSize);
    }
  }

  // Query blocks [round, round + count) of a part.
  void differentiate_group(const Tiles& tiles, const Head& head, int64_t part, int64_t round,
                           int64_t count, float* memory) const {
    BlockScores scores(memory);
    memory += BlockScores::kFloats;
    QueryBlock blocks[kGroup];
    KeyRange any{INT64_MAX, 0};
    for (int64_t i = 0; i < count; ++i) {
      blocks[i].place(memory + i * kBlockSize, kDim);
      load_queries<kDim>(p_, query_rows(head, plan_.block_at(part, round + i)), head.keys.begin,
                         blocks[i]);
      for (const TileRange<kSliceVecs>& range : blocks[i].ranges) {
        if (range.any.empty()) continue;
        any = {std::min(any.begin, range.any.begin), std::max(any.end, range.any.end)};
      }
    }
    for (int64_t key = any.begin / kBlockKeys * kBlockKeys; key < any.end; key += kBlockKeys) {
      const KeyBlock keys = keys_at(head, part, key);
      for (int64_t i = 0; i < count; ++i) differentiate_block<kDim>(tiles, blocks[i], keys, scores);
    }
    finish_grad_q<kDim>(tiles, scores);
    for (int64_t i = 0; i < count; ++i) {
      store_queries<kDim>(p_, query_rows(head, plan_.block_at(part, round + i)), blocks[i]);
    }
  }

  // Row `row` of dK or dV, summed over the parts in order.
  DROPE_INLINE void gather_key(const float* grad, int64_t row, float* sum) const {
    grad += row / kBlockKeys * kBlockKeys * kGradSize + row % kBlockKeys * kLanes;
    for (int64_t tile = 0; tile < Channels<kDim>::kTiles; ++tile, grad += kKeyTiles * kTile) {
      Vec channels = load(grad);
      for (int64_t part = 1; part < plan_.num_parts; ++part) {
        channels = channels + load(grad + part * plan_.max_keys * 2 * kGradSize);
      }
      store(sum + tile * kLanes, channels);
    }
  }

  void store_keys(const Head& head, int64_t begin, int64_t end) const {
    uint16_t* grad_k_rows = static_cast<uint16_t*>(p_.grad_k) +
                            head.batch * p_.stride_grad_k_batch +
                            head.kv_head * p_.stride_grad_k_head;
    uint16_t* grad_v_rows = static_cast<uint16_t*>(p_.grad_v) +
                            head.batch * p_.stride_grad_v_batch +
                            head.kv_head * p_.stride_grad_v_head;
    const RotaryRows rotation = undo_key_rotation(p_, head.batch, head.kv_head);
    alignas(64) float sum[kDim];
    for (int64_t key = begin; key < end; ++key) {
      uint16_t* grad_k_row = grad_k_rows + key * p_.stride_grad_k_row;
      uint16_t* grad_v_row = grad_v_rows + key * p_.stride_grad_v_row;
      if (key < head.keys.begin || key >= head.keys.end) {
        std::memset(grad_k_row, 0, sizeof(uint16_t) * p_.head_dim);
        std::memset(grad_v_row, 0, sizeof(uint16_t) * p_.head_dim_v);
        continue;
      }
      const int64_t row = key - head.keys.begin;
      gather_key(grad_k(head, 0), row, sum);
      store_unrotated<BFloat16>(rotation, key, sum, p_.head_dim, grad_k_row);
      gather_key(grad_v(head, 0), row, sum);
      copy_row<Float32, BFloat16>(NoPosition{}, key, sum, grad_v_row, p_.head_dim_v);
    }
  }

  const AttentionBackwardParams& p_;
  BackwardPlan plan_;
  Scratch heads_, blocks_;
};

// For the calls that tiles_refusal lets pass.
inline void backward_on_tiles(const AttentionBackwardParams& params, const CpuOptions& options) {
  switch (steps(std::max(params.head_dim, params.head_dim_v))) {
    case 1:
      return Backward<32>(params, options).run();
    case 2:
      return Backward<64>(params, options).run();
    case 3:
      return Backward<96>(params, options).run();
    default:
      return Backward<128>(params, options).run();
  }
}

}  // namespace drope::DROPE_ISA
