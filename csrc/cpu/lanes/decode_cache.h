// The caches of a decode call: where a row's keys lie, and the append.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/rotary.h"

namespace drope::DROPE_ISA {

// The keys, or the values, of one batch row and kv head. A cache without pages is one long page.
template <class Element>
struct CachedRows {
  using Storage = typename Element::Storage;

  Storage* data;  // of page 0
  int64_t stride_page, stride_row;
  const int32_t* pages;  // null: all rows lie in page 0
  int64_t page_size;

  // Calls visit(key, row) for keys [begin, end).
  template <class Visit>
  DROPE_INLINE void for_rows(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t key = begin; key < end;) {
      const int64_t page = key / page_size;
      const int64_t page_end = std::min(end, (page + 1) * page_size);
      Storage* row = data + (pages == nullptr ? page : pages[page]) * stride_page +
                     (key - page * page_size) * stride_row;
      for (; key < page_end; ++key, row += stride_row) visit(key, row);
    }
  }
};

template <class Element>
DROPE_INLINE CachedRows<Element> cached_rows(const AttentionDecodeParams& p, void* cache,
                                             int64_t stride_batch, int64_t stride_head,
                                             int64_t stride_row, int64_t batch, int64_t kv_head) {
  auto* data = static_cast<typename Element::Storage*>(cache) + kv_head * stride_head;
  if (p.page_table == nullptr) {
    return {data + batch * stride_batch, 0, stride_row, nullptr, std::max<int64_t>(p.seqlen_kv, 1)};
  }
  return {data, stride_batch, stride_row, p.page_table + batch * p.stride_page_table_batch,
          p.page_size};
}

template <class Element>
DROPE_INLINE CachedRows<Element> cached_keys(const AttentionDecodeParams& p, int64_t batch,
                                             int64_t kv_head) {
  return cached_rows<Element>(p, p.k_cache, p.stride_k_batch, p.stride_k_head, p.stride_k_row,
                              batch, kv_head);
}

template <class Element>
DROPE_INLINE CachedRows<Element> cached_values(const AttentionDecodeParams& p, int64_t batch,
                                               int64_t kv_head) {
  return cached_rows<Element>(p, p.v_cache, p.stride_v_batch, p.stride_v_head, p.stride_v_row,
                              batch, kv_head);
}

// Writes the new keys, rotated or as they are, and values of one batch row and kv head behind those
// that it holds.
template <class Element>
void append_rows(const AttentionDecodeParams& p, int64_t batch, int64_t kv_head) {
  using Storage = typename Element::Storage;
  const int64_t begin = p.cache_seqlens[batch], end = begin + p.seqlen_new;
  const auto* k_new = static_cast<const Storage*>(p.k_new) + batch * p.stride_k_new_batch +
                      kv_head * p.stride_k_new_head;
  const auto* v_new = static_cast<const Storage*>(p.v_new) + batch * p.stride_v_new_batch +
                      kv_head * p.stride_v_new_head;
  const auto append = [&](const auto& position) {
    cached_keys<Element>(p, batch, kv_head).for_rows(begin, end, [&](int64_t key, Storage* row) {
      const Storage* from = k_new + (key - begin) * p.stride_k_new_row;
      copy_row<Element, Element>(position, key, from, row, p.head_dim);
    });
  };
  if (p.rotated_cache && p.rotary.rotary_dim > 0) {
    append(key_rotation(p, batch, kv_head, 1.0f));
  } else {
    append(NoPosition{});
  }
  cached_values<Element>(p, batch, kv_head).for_rows(begin, end, [&](int64_t key, Storage* row) {
    convert_row<Element, Element>(v_new + (key - begin) * p.stride_v_new_row, row, p.head_dim_v);
  });
}

}  // namespace drope::DROPE_ISA
