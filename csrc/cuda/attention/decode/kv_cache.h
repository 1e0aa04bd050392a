// Where the keys of one row of the batch lie in a decode call: in the cache, which is contiguous or
// dealt to pages, and from the row's old length on in k_new and v_new.
#pragma once

#include <cstdint>

#include "cuda/attention/shared/head_rows.h"
#include "cuda/attention/shared/sequence.h"
#include "cuda/tile/warp_search.h"

namespace drope::cuda {

// As read, not checked yet: a page may be anything until `is_lost` has seen it.
struct KeyPlace {
  int page;  // index of the cache's first dimension; of a new key, its row in k_new and v_new
  int slot;  // row of the page, or one of these:
  static constexpr int kNew = -1;
  static constexpr int kNone = -2;  // not wanted: reads as zeros
};

struct KvCache {
  const AttentionDecodeParams& params;
  int64_t batch;
  int kv_head;
  int64_t num_cached, num_keys;  // before the call and after it

  __device__ __forceinline__ KvCache(const AttentionDecodeParams& params, int64_t batch,
                                     int kv_head)
      : params(params),
        batch(batch),
        kv_head(kv_head),
        num_cached(params.cache_seqlens[batch]),
        num_keys(num_cached + params.seqlen_new) {}

  // Whether the new keys have a place, each of them: otherwise nothing of the row is written, and
  // its results are NaN. Asked by whole warps.
  __device__ __forceinline__ bool fits() const {
    if (num_cached < 0 || num_keys > params.seqlen_kv) return false;
    if (params.page_table == nullptr || params.seqlen_new == 0) return true;
    const int page_size = static_cast<int>(params.page_size);
    const int last = static_cast<int>(num_keys - 1) / page_size;
    bool lost = false;
#pragma unroll 1
    for (int page = static_cast<int>(num_cached) / page_size + tile::lane_index(); page <= last;
         page += tile::kWarpSize) {
      lost |= is_lost(slot_of(page * page_size));
    }
    return tile::lanes_where(lost) == 0;
  }

  // The cache's slot for a key < seqlen_kv, whether it was written already or not.
  __device__ __forceinline__ KeyPlace slot_of(int key) const {
    if (params.page_table == nullptr) return {static_cast<int>(batch), key};
    const unsigned page_size = static_cast<unsigned>(params.page_size);
    const unsigned page = static_cast<unsigned>(key) / page_size;
    return {params.page_table[batch * params.stride_page_table_batch + page],
            key - static_cast<int>(page * page_size)};
  }

  // Where to read a key < num_keys: nobody reads the slots that this call fills.
  __device__ __forceinline__ KeyPlace place_of(int key) const {
    if (key >= num_cached) return {static_cast<int>(key - num_cached), KeyPlace::kNew};
    return slot_of(key);
  }

  // Its page does not exist: reads as zeros, and who sees the key has no result.
  __device__ __forceinline__ bool is_lost(KeyPlace place) const {
    return params.page_table != nullptr && place.slot >= 0 &&
           (place.page < 0 || place.page >= params.num_pages);
  }

  __device__ __forceinline__ SourceRows new_keys() const {
    return {static_cast<const uint16_t*>(params.k_new) + batch * params.stride_k_new_batch +
                kv_head * params.stride_k_new_head,
            params.stride_k_new_row};
  }
  __device__ __forceinline__ SourceRows new_values() const {
    return {static_cast<const uint16_t*>(params.v_new) + batch * params.stride_v_new_batch +
                kv_head * params.stride_v_new_head,
            params.stride_v_new_row};
  }
  __device__ __forceinline__ TargetRows key_page(int page) const {
    return {static_cast<uint16_t*>(params.k_cache) + page * params.stride_k_batch +
                kv_head * params.stride_k_head,
            params.stride_k_row};
  }
  __device__ __forceinline__ TargetRows value_page(int page) const {
    return {static_cast<uint16_t*>(params.v_cache) + page * params.stride_v_batch +
                kv_head * params.stride_v_head,
            params.stride_v_row};
  }

  __device__ __forceinline__ bool is_there(KeyPlace place) const {
    return place.slot != KeyPlace::kNone && !is_lost(place);
  }
  __device__ __forceinline__ const uint16_t* key_row(KeyPlace place) const {
    if (place.slot == KeyPlace::kNew) return new_keys().at(place.page);
    return is_there(place) ? key_page(place.page).at(place.slot) : no_row();
  }
  __device__ __forceinline__ const uint16_t* value_row(KeyPlace place) const {
    if (place.slot == KeyPlace::kNew) return new_values().at(place.page);
    return is_there(place) ? value_page(place.page).at(place.slot) : no_row();
  }

 private:
  // A copy of no bytes names an address all the same.
  __device__ __forceinline__ const uint16_t* no_row() const {
    return static_cast<const uint16_t*>(params.q);
  }
};

}  // namespace drope::cuda
