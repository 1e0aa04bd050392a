// csrc/cuda/heuristics.h for test_heuristics.py, as C functions.
#include "../../../csrc/cuda/heuristics.h"

using namespace drope::cuda;

extern "C" {

int head_dim_of(int family, int64_t head_dim, int64_t head_dim_v) {
  return head_dim_config(static_cast<Family>(family), head_dim, head_dim_v);
}

int decode_block_rows(int head_dim, int64_t group_rows) {
  return decode_block(head_dim, group_rows).rows;
}

int decode_splits(int64_t num_tiles, int64_t num_kv_blocks, int64_t num_slots) {
  return num_decode_splits(num_tiles, num_kv_blocks, num_slots);
}

int64_t persistent_blocks(int64_t num_tiles, int num_sms, int blocks_per_sm) {
  return num_persistent_blocks(num_tiles, num_sms, blocks_per_sm);
}

int64_t section_heads(int64_t l2_bytes, int64_t kv_bytes_per_head, int64_t num_kv_heads) {
  return kv_heads_per_section(l2_bytes, kv_bytes_per_head, num_kv_heads);
}

// tiles: (num_tiles, 3) q_block, head, batch in the order of the schedule. Returns num_tiles.
int64_t schedule(int64_t num_q_blocks, int64_t num_heads_q, int64_t num_heads_kv, int64_t batch,
                 int64_t kv_bytes_per_head, int64_t l2_bytes, int32_t* tiles) {
  const TileSchedule s =
      tile_schedule(num_q_blocks, num_heads_q, num_heads_kv, batch, kv_bytes_per_head, l2_bytes);
  for (int64_t i = 0; i < s.num_tiles; ++i) {
    const TileSchedule::Tile tile = s.tile(i);
    tiles[3 * i] = tile.q_block;
    tiles[3 * i + 1] = tile.head;
    tiles[3 * i + 2] = tile.batch;
  }
  return s.num_tiles;
}

}  // extern "C"
