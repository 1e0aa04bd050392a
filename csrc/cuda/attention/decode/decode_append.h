// Writes k_new and v_new to the cache. All blocks of a (batch row, kv head) share the work; nobody
// reads the slots that it fills, so that it needs no order with the rest of the kernel.
#pragma once

#include <cstdint>

#include "cuda/attention/decode/kv_cache.h"
#include "cuda/attention/shared/rotary.h"
#include "cuda/tile/smem_tile.h"
#include "cuda/tile/warp_search.h"

namespace drope::cuda {

// One of the warps that share something.
struct WarpOf {
  int index, count;
};

// Calls copy(new key, its slot, piece) for each of `num_pieces` of each new key.
template <class Copy>
__device__ __forceinline__ void for_new_keys(const KvCache& cache, WarpOf warp, int num_pieces,
                                             const Copy& copy) {
  const int num_new = static_cast<int>(cache.params.seqlen_new);
#pragma unroll 1
  for (int key = warp.index; key < num_new; key += warp.count) {
    const KeyPlace slot = cache.slot_of(static_cast<int>(cache.num_cached) + key);
#pragma unroll 1
    for (int piece = tile::lane_index(); piece < num_pieces; piece += tile::kWarpSize) {
      copy(key, slot, piece);
    }
  }
}

__device__ __forceinline__ void copy_chunk(uint16_t* to, const uint16_t* from, int chunk) {
  reinterpret_cast<uint4*>(to)[chunk] = reinterpret_cast<const uint4*>(from)[chunk];
}

__device__ __forceinline__ void append_keys(const KvCache& cache, WarpOf warp) {
  const int num_chunks = static_cast<int>(cache.params.head_dim / tile::kChunkCols);
  for_new_keys(cache, warp, num_chunks, [&](int key, KeyPlace slot, int chunk) {
    copy_chunk(cache.key_page(slot.page).at(slot.slot), cache.new_keys().at(key), chunk);
  });
}

// As append_keys; a piece is a pair of channels, rotated if the rotation reaches it.
template <class T>
__device__ __forceinline__ void append_rotated_keys(T, const KvCache& cache,
                                                    const Rotation& rotation, WarpOf warp) {
  const int num_pairs = static_cast<int>(cache.params.head_dim / 2);
  for_new_keys(cache, warp, num_pairs, [&](int key, KeyPlace slot, int pair) {
    const uint16_t* const from = cache.new_keys().at(key);
    uint16_t* const to = cache.key_page(slot.page).at(slot.slot);
    if (pair >= rotation.num_pairs()) {
      to[2 * pair] = from[2 * pair];
      to[2 * pair + 1] = from[2 * pair + 1];
      return;
    }
    const int first = rotation.first_channel(pair), second = rotation.second_channel(pair);
    uint16_t x1 = from[first], x2 = from[second];
    rotate_pair(T{}, x1, x2, rotation.angle(static_cast<float>(cache.num_cached + key), pair));
    to[first] = x1;
    to[second] = x2;
  });
}

__device__ __forceinline__ void append_values(const KvCache& cache, WarpOf warp) {
  const int num_chunks = static_cast<int>(cache.params.head_dim_v / tile::kChunkCols);
  for_new_keys(cache, warp, num_chunks, [&](int key, KeyPlace slot, int chunk) {
    copy_chunk(cache.value_page(slot.page).at(slot.slot), cache.new_values().at(key), chunk);
  });
}

template <class T>
__device__ __forceinline__ void append(T, NoPosition, const KvCache& cache, WarpOf warp) {
  append_keys(cache, warp);
  append_values(cache, warp);
}

template <class T>
__device__ __forceinline__ void append(T, Rotary, const KvCache& cache, WarpOf warp) {
  if (cache.params.rotated_cache) {
    append_rotated_keys(T{}, cache, Rotation(cache.params.rotary, cache.kv_head, 1.0f), warp);
  } else {
    append_keys(cache, warp);
  }
  append_values(cache, warp);
}

}  // namespace drope::cuda
