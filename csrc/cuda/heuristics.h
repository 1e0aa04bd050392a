// What the host decides before a launch. Pure functions of sizes and of the device: no CUDA calls,
// the same answer on every machine. Costs are in units of one block of keys. They are estimates:
// nothing here was measured on a GPU yet.
#pragma once

#include <cstdint>

#include "position.h"

namespace drope::cuda {

enum class Family : int { kSm80 = 80, kSm90 = 90 };

struct DeviceProperties {
  int capability = 0;        // 10 * major + minor
  int num_sms = 0;           // streaming multiprocessors
  int64_t l2_bytes = 0;      // of the second-level cache
  int64_t shared_bytes = 0;  // that one block may ask for
};

constexpr int64_t kMaxSeqlen = int64_t{1} << 30;            // kernels count rows in int32
constexpr int64_t kMaxGridBlocks = (int64_t{1} << 31) - 1;  // of a grid's first dimension
constexpr int kMaxSplits = 128;

DROPE_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The HEAD_DIM of the smallest kernel that holds the channels; 0 when the family has none.
constexpr int head_dim_config(Family family, int64_t head_dim, int64_t head_dim_v) {
  constexpr int kSm80[] = {64, 96, 128, 256}, kSm90[] = {64, 128};
  const int64_t channels = head_dim > head_dim_v ? head_dim : head_dim_v;
  if (family == Family::kSm90) {
    for (const int config : kSm90) {
      if (channels <= config) return config;
    }
    return 0;
  }
  for (const int config : kSm80) {
    if (channels <= config) return config;
  }
  return 0;
}

// A block of the decode kernel, as far as the number of splits depends on it. A row is one query of
// one head of the group that shares a kv head.
struct DecodeBlock {
  int rows, keys, blocks_per_sm;
};

constexpr DecodeBlock decode_block(int head_dim_config, int64_t group_rows) {
  const bool is_wide = group_rows > 16 && head_dim_config <= 128;
  return {is_wide ? 32 : 16, head_dim_config <= 128 ? 64 : 32, 2};
}

// How many blocks share the keys of one tile of queries: the number of splits with the least
// estimated time, waves * (key blocks per split + fixed cost) + merging. The smallest of equals.
//   num_tiles   tiles of queries over all batch rows and kv heads
//   num_slots   blocks that the device runs at once
constexpr int num_decode_splits(int64_t num_tiles, int64_t num_kv_blocks, int64_t num_slots) {
  constexpr double kFixedBlocks = 2.0;   // loading q, the first copies, the epilogue
  constexpr double kMergeBlocks = 0.05;  // reading one more partial result
  constexpr double kMergeLaunch = 1.0;   // the merging kernel, once
  if (num_tiles <= 0 || num_kv_blocks <= 1 || num_slots <= 0) return 1;
  int best = 1;
  double best_cost = 0.0;
  const int64_t limit = num_kv_blocks < kMaxSplits ? num_kv_blocks : kMaxSplits;
  for (int64_t splits = 1; splits <= limit; ++splits) {
    const int64_t waves = ceil_div(num_tiles * splits, num_slots);
    double cost = waves * (ceil_div(num_kv_blocks, splits) + kFixedBlocks);
    if (splits > 1) cost += kMergeLaunch + kMergeBlocks * splits;
    if (splits == 1 || cost < best_cost) {
      best = static_cast<int>(splits);
      best_cost = cost;
    }
  }
  return best;
}

// Blocks of a persistent grid: as many as run at once, not more than there are tiles.
constexpr int64_t num_persistent_blocks(int64_t num_tiles, int num_sms, int blocks_per_sm) {
  const int64_t num_slots = int64_t{num_sms} * blocks_per_sm;
  return num_tiles < num_slots ? num_tiles : num_slots;
}

// How many kv heads (of any batch row) are worked on together: their keys and values shall stay in
// 5/8 of L2 (32 MB of an H100's 50) while all their queries pass. At least one.
constexpr int64_t kv_heads_per_section(int64_t l2_bytes, int64_t kv_bytes_per_head,
                                       int64_t num_kv_heads) {
  const int64_t fitting =
      kv_bytes_per_head > 0 ? l2_bytes / 8 * 5 / kv_bytes_per_head : num_kv_heads;
  const int64_t at_least_one = fitting < 1 ? 1 : fitting;
  return at_least_one < num_kv_heads ? at_least_one : num_kv_heads;
}

// The order in which a persistent grid takes tiles: section by section, so that keys and values
// are read from L2; inside a section the last q_block, which sees most keys when causal, first.
// Sections differ by one kv head at most: a small last one would leave most of the device idle.
struct TileSchedule {
  struct Tile {
    int32_t q_block;
    int32_t head;   // of q
    int32_t batch;  // or sequence, in packed calls
  };

  uint32_t num_tiles;  // at most kMaxGridBlocks: divisions in 32 bits are the cheap ones
  uint32_t num_q_blocks;
  uint32_t num_heads_q;
  uint32_t group;                // q heads of a kv head
  uint32_t heads_per_section;    // q heads, of any batch row
  uint32_t num_larger_sections;  // come first and have one kv head more

  DROPE_ANYWHERE Tile tile(int64_t index) const {
    const uint32_t larger = heads_per_section + group;
    const uint32_t heads_in_larger = num_larger_sections * larger;
    const bool is_in_larger = index < heads_in_larger * num_q_blocks;
    const uint32_t from_head = is_in_larger ? 0 : heads_in_larger;
    const uint32_t num_heads = is_in_larger ? larger : heads_per_section;
    const uint32_t from_index = static_cast<uint32_t>(index) - from_head * num_q_blocks;
    const uint32_t section = from_index / (num_heads * num_q_blocks);
    const uint32_t rest = from_index - section * (num_heads * num_q_blocks);
    const uint32_t row = rest / num_heads;
    const uint32_t head = from_head + section * num_heads + (rest - row * num_heads);
    return {static_cast<int32_t>(num_q_blocks - 1 - row), static_cast<int32_t>(head % num_heads_q),
            static_cast<int32_t>(head / num_heads_q)};
  }
};

constexpr TileSchedule tile_schedule(int64_t num_q_blocks, int64_t num_heads_q,
                                     int64_t num_heads_kv, int64_t batch, int64_t kv_bytes_per_head,
                                     int64_t l2_bytes) {
  const int64_t num_tiles = num_q_blocks * num_heads_q * batch;
  if (num_tiles == 0) return {};
  const int64_t kv_heads = num_heads_kv * batch, group = num_heads_q / num_heads_kv;
  const int64_t num_sections =
      ceil_div(kv_heads, kv_heads_per_section(l2_bytes, kv_bytes_per_head, kv_heads));
  return {static_cast<uint32_t>(num_tiles),
          static_cast<uint32_t>(num_q_blocks),
          static_cast<uint32_t>(num_heads_q),
          static_cast<uint32_t>(group),
          static_cast<uint32_t>(kv_heads / num_sections * group),
          static_cast<uint32_t>(kv_heads % num_sections)};
}

}  // namespace drope::cuda
