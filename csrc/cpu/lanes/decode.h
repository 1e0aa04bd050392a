// Attention decode:
//   append the new keys and values to the caches                               (decode_cache.h)
//   few queries: attend to the rows of the cache as they lie, split by split   (decode_splits.h)
//   many queries: forward over the cache, whose pages are gathered first
#pragma once

#include <cstring>

#include "cpu/lanes/few_queries.h"
#include "cpu/lanes/forward.h"

namespace drope::DROPE_ISA {

// Where the rows of a batch end, as attention over plain keys has it.
class RowEnds {
 public:
  explicit RowEnds(const AttentionDecodeParams& p) : numbers_(2 * p.batch) {
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      const auto end = static_cast<int32_t>(p.cache_seqlens[batch] + p.seqlen_new);
      kv_end()[batch] = end;
      q_start(p.batch)[batch] = end - static_cast<int32_t>(p.seqlen_q);
      longest_ = std::max<int64_t>(longest_, end);
    }
  }

  void set(MaskParams& mask, int64_t batch) const {
    mask.causal = true;
    mask.kv_end = kv_end();
    mask.q_start = q_start(batch);
  }
  int64_t longest() const { return longest_; }

 private:
  int32_t* kv_end() const { return reinterpret_cast<int32_t*>(numbers_.data()); }
  int32_t* q_start(int64_t batch) const { return kv_end() + batch; }

  Scratch numbers_;
  int64_t longest_ = 0;
};

// Many queries: the forward kernel.
template <class Element, class Dot>
class DecodeByForward {
  using Storage = typename Element::Storage;

 public:
  DecodeByForward(const AttentionDecodeParams& params, int64_t longest, const CpuOptions& options)
      : p_(params),
        options_(options),
        longest_(longest),
        batches_at_a_time_(batches_at_a_time()),
        queries_(rotates_queries()
                     ? storage_floats(p_.batch * p_.num_heads_q * p_.seqlen_q * p_.head_dim)
                     : 0),
        k_(gathered(p_.head_dim)),
        v_(gathered(p_.head_dim_v)) {}

  void run() const {
    AttentionForwardParams forward_params;
    static_cast<AttentionParams&>(forward_params) = p_;
    forward_params.out = p_.out;
    forward_params.stride_out_batch = p_.stride_out_batch;
    forward_params.stride_out_head = p_.stride_out_head;
    forward_params.stride_out_row = p_.stride_out_row;
    forward_params.lse = p_.lse;
    if (rotates_queries()) rotate_queries(forward_params);
    if (p_.page_table == nullptr) return Forward<Element, Dot>(forward_params, options_).run();
    for (int64_t batch = 0; batch < p_.batch; batch += batches_at_a_time_) {
      const int64_t count = std::min(batches_at_a_time_, p_.batch - batch);
      attend_gathered(forward_params, batch, count);
    }
  }

 private:
  // A rotated cache leaves the queries to rotate; the forward kernel would rotate keys as well.
  bool rotates_queries() const { return p_.rotary.rotary_dim > 0 && p_.rotated_cache; }

  static int64_t storage_floats(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(Storage)) + 3) / 4;
  }

  int64_t batches_at_a_time() const {
    constexpr int64_t kGatheredElements = 16 << 20;
    const int64_t row = p_.num_heads_kv * longest_ * (p_.head_dim + p_.head_dim_v);
    return std::clamp<int64_t>(kGatheredElements / std::max<int64_t>(row, 1), 1,
                               std::max<int64_t>(p_.batch, 1));
  }

  int64_t gathered(int64_t dim) const {
    if (p_.page_table == nullptr) return 0;
    return storage_floats(batches_at_a_time_ * p_.num_heads_kv * longest_ * dim);
  }

  void rotate_queries(AttentionForwardParams& forward_params) const {
    auto* const rotated = reinterpret_cast<Storage*>(queries_.data());
    parallel_for(options_.num_threads, p_.batch * p_.num_heads_q, [&](int64_t task, int) {
      const int64_t batch = task / p_.num_heads_q, head = task % p_.num_heads_q;
      const int64_t group = p_.num_heads_q / p_.num_heads_kv;
      const RotaryRows rotation = query_rotation(p_, batch, head / group, 1.0f);
      const auto* from =
          static_cast<const Storage*>(p_.q) + batch * p_.stride_q_batch + head * p_.stride_q_head;
      Storage* to = rotated + task * p_.seqlen_q * p_.head_dim;
      for (int64_t row = 0; row < p_.seqlen_q; ++row, to += p_.head_dim) {
        copy_row<Element, Element>(rotation, row, from + row * p_.stride_q_row, to, p_.head_dim);
      }
    });
    forward_params.q = rotated;
    forward_params.stride_q_row = p_.head_dim;
    forward_params.stride_q_head = p_.seqlen_q * p_.head_dim;
    forward_params.stride_q_batch = p_.num_heads_q * forward_params.stride_q_head;
    forward_params.rotary.rotary_dim = 0;
  }

  // Batch rows [first, first + count): their pages, up to the longest row of the call.
  void attend_gathered(AttentionForwardParams forward_params, int64_t first, int64_t count) const {
    auto* const k = reinterpret_cast<Storage*>(k_.data());
    auto* const v = reinterpret_cast<Storage*>(v_.data());
    parallel_for(options_.num_threads, count * p_.num_heads_kv, [&](int64_t task, int) {
      const int64_t batch = first + task / p_.num_heads_kv, kv_head = task % p_.num_heads_kv;
      const KeyRange keys = visible_to_any(p_, batch);
      gather(cached_keys<Element>(p_, batch, kv_head), keys, p_.head_dim,
             k + task * longest_ * p_.head_dim);
      gather(cached_values<Element>(p_, batch, kv_head), keys, p_.head_dim_v,
             v + task * longest_ * p_.head_dim_v);
    });
    AttentionForwardParams& f = forward_params;
    f.batch = count;
    f.seqlen_kv = longest_;
    f.k = k;
    f.stride_k_row = p_.head_dim;
    f.stride_k_head = longest_ * p_.head_dim;
    f.stride_k_batch = p_.num_heads_kv * f.stride_k_head;
    f.v = v;
    f.stride_v_row = p_.head_dim_v;
    f.stride_v_head = longest_ * p_.head_dim_v;
    f.stride_v_batch = p_.num_heads_kv * f.stride_v_head;
    f.q = static_cast<const Storage*>(f.q) + first * f.stride_q_batch;
    f.out = static_cast<Storage*>(f.out) + first * f.stride_out_batch;
    f.lse += first * f.num_heads_q * f.seqlen_q;
    if (f.scale_rows != nullptr) f.scale_rows += first * f.stride_scale_batch;
    f.mask.q_start += first;
    f.mask.kv_end += first;
    if (f.mask.kv_start != nullptr) f.mask.kv_start += first;
    Forward<Element, Dot>(f, options_).run();
  }

  static void gather(const CachedRows<Element>& rows, KeyRange keys, int64_t dim, Storage* to) {
    rows.for_rows(keys.begin, keys.end, [&](int64_t key, const Storage* row) {
      convert_row<Element, Element>(row, to + key * dim, dim);
    });
  }

  const AttentionDecodeParams& p_;
  CpuOptions options_;
  int64_t longest_, batches_at_a_time_;
  Scratch queries_, k_, v_;
};

template <class Element>
void append(const AttentionDecodeParams& p, const CpuOptions& options) {
  constexpr int64_t kElementsPerThread = 64 << 10;  // fewer are not worth a wake-up
  const int64_t num_heads = p.batch * p.num_heads_kv;
  const int64_t num_elements = num_heads * p.seqlen_new * (p.head_dim + p.head_dim_v);
  const int64_t threads = std::min<int64_t>(options.num_threads, num_elements / kElementsPerThread);
  parallel_for(static_cast<int>(threads), num_heads, [&](int64_t task, int) {
    append_rows<Element>(p, task / p.num_heads_kv, task % p.num_heads_kv);
  });
}

template <class Element, class Dot>
void decode_elements(const AttentionDecodeParams& params, const CpuOptions& options) {
  const RowEnds ends(params);
  AttentionDecodeParams p = params;
  p.rotary.positions = p.rotary.kv_positions = nullptr;
  ends.set(p.mask, p.batch);
  if (p.num_heads_kv == 0 || p.seqlen_q == 0) return append<Element>(p, options);
  // Memory is taken before the caches are written.
  if (p.seqlen_q <= kFewQueries) {
    const DecodeSplits<Element, Dot> attention(p, options);
    append<Element>(p, options);
    attention.run();
  } else {
    const DecodeByForward<Element, Dot> attention(p, ends.longest(), options);
    append<Element>(p, options);
    attention.run();
  }
}

inline void decode(const AttentionDecodeParams& params, const CpuOptions& options) {
  switch (params.dtype) {
    case DType::kFloat32:
      return decode_elements<Float32, DotFloat32>(params, options);
    case DType::kFloat16:
      return decode_elements<Float16, DotFloat32>(params, options);
    case DType::kBFloat16:
      return decode_elements<BFloat16, DotForBFloat16>(params, options);
  }
}

}  // namespace drope::DROPE_ISA
