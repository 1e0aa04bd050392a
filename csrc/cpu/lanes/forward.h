// Attention forward:
//   tabulate the angles that all heads of a batch row rotate by
//   pack k, rotated, and v once per kv head
//   for each tile of queries: pack q, rotated
//     for each kv block: scores, mask, softmax update, accumulate      (attend.h)
//     divide by the row sums, store out, lse and what backward needs of the softmax
#pragma once

#include <cmath>

#include "cpu/attention_cpu.h"
#include "cpu/lanes/attend.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace drope::DROPE_ISA {

inline void store_row_state(const AttentionForwardParams& p, int64_t batch, int64_t head,
                            int64_t query, const RowSoftmax& softmax) {
  const int64_t row = (batch * p.num_heads_q + head) * p.seqlen_q + query;
  p.lse[row] = softmax.lse(scale_of_row(p, batch, head, query), p.softcap);
  if (p.softmax_state == nullptr) return;
  p.softmax_state[row] = softmax.reference(p.softcap);
  p.softmax_state[p.batch * p.num_heads_q * p.seqlen_q + row] = softmax.log2_sum();
}

// Normalises a tile and stores the rows that exist: out (query, channel) from acc_o (channel,
// query).
template <class Element, int kVecCount>
void store_tile(const AttentionForwardParams& p, int64_t batch, int64_t head, int64_t first_query,
                const Softmax<kVecCount>& softmax, const float* acc_o) {
  constexpr int64_t kQueries = kVecCount * kLanes;
  auto* out = static_cast<typename Element::Storage*>(p.out) + batch * p.stride_out_batch +
              head * p.stride_out_head;
  for (int v = 0; v < kVecCount; ++v) {
    const int64_t query = first_query + v * kLanes;
    const int rows = static_cast<int>(std::min<int64_t>(kLanes, p.seqlen_q - query));
    const Vec sum = softmax.row_sum[v];
    const Vec inverse = select(equal(sum, zero()), zero(), broadcast(1.0f) / sum);
    float sums[kLanes], maxima[kLanes];
    store(sums, sum);
    store(maxima, softmax.row_max[v]);
    for (int i = 0; i < rows; ++i) store_row_state(p, batch, head, query + i, {maxima[i], sums[i]});
    for (int64_t channel = 0; channel < p.head_dim_v; channel += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = load(acc_o + (channel + i) * kQueries + v * kLanes) * inverse;
      }
      transpose(block);
      const int channels = static_cast<int>(std::min<int64_t>(kLanes, p.head_dim_v - channel));
      auto* row = out + query * p.stride_out_row + channel;
      if (rows == kLanes && channels == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) Element::store(row + i * p.stride_out_row, block[i]);
      } else {
        for (int i = 0; i < rows; ++i) {
          Element::store(row + i * p.stride_out_row, block[i], channels);
        }
      }
    }
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
  int64_t k_angles, angles_size;   // floats of a batch row's angles: of its keys, of all
  int num_threads;
  int64_t heads_at_a_time;    // kv heads packed together, so that every thread finds work
  int64_t batches_at_a_time;  // batch rows that these heads belong to, at most

  ForwardPlan(const AttentionForwardParams& p, const CpuOptions& options) {
    constexpr int64_t kQueries = kMaxVecs * kLanes;
    k_words = words<Dot>(p.head_dim);
    v_dim = round_up(p.head_dim_v, kRows);
    max_keys = 0;
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      const KeyRange keys = packed_keys(p, batch);
      max_keys = std::max(max_keys, keys.end - keys.begin);
    }
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

    const bool shared_angles =
        p.rotary.rotary_dim > 0 && p.rotary.num_tables == 1 && p.num_heads_q > 1;
    const int64_t row_angles = shared_angles ? RotaryRows::angle_floats(p.rotary.rotary_dim) : 0;
    k_angles = round_up(max_keys, kLanes) * row_angles;
    angles_size = k_angles + p.seqlen_q * row_angles;
    // Heads packed together may begin and end inside a batch row.
    batches_at_a_time =
        std::min(p.batch, (heads_at_a_time + p.num_heads_kv - 2) / p.num_heads_kv + 1);
  }

  // Keys that a batch row needs packed: those some query sees, or all when rotated keys are kept.
  static KeyRange packed_keys(const AttentionForwardParams& p, int64_t batch) {
    return p.k_prepared != nullptr ? KeyRange{0, p.seqlen_kv} : visible_to_any(p, batch);
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
        angles_(plan_.batches_at_a_time * plan_.angles_size) {}

  void run() const {
    const int64_t num_blocks = (plan_.max_keys + kBlockKv - 1) / kBlockKv;
    const int64_t tiles_per_head = p_.num_heads_q / p_.num_heads_kv * plan_.num_tiles;
    const int64_t num_heads = p_.batch * p_.num_heads_kv;
    int64_t num_tabulated = 0;  // batch rows
    for (int64_t first = 0; first < num_heads; first += plan_.heads_at_a_time) {
      const int64_t count = std::min(plan_.heads_at_a_time, num_heads - first);
      const int64_t batch_end = (first + count - 1) / p_.num_heads_kv + 1;
      if (plan_.angles_size > 0) tabulate_batches(num_tabulated, batch_end);
      num_tabulated = batch_end;
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
    const KeyRange keys = plan_.packed_keys(p_, batch);
    const float* k = heads_.data() + slot * (plan_.k_size + plan_.v_size);
    return {k, k + plan_.k_size, keys.begin, keys.end - keys.begin, plan_.k_words, plan_.v_dim};
  }

  float* batch_angles(int64_t batch) const {
    return angles_.data() + batch % plan_.batches_at_a_time * plan_.angles_size;
  }

  RotaryRows rotation_of_keys(int64_t batch, int64_t kv_head) const {
    RotaryRows rotation = key_rotation(p_, batch, kv_head, 1.0f);
    if (plan_.angles_size > 0) rotation.angles = batch_angles(batch);
    rotation.first_angle = plan_.packed_keys(p_, batch).begin;
    return rotation;
  }

  RotaryRows rotation_of_queries(int64_t batch, int64_t kv_head) const {
    RotaryRows rotation = query_rotation(p_, batch, kv_head, 1.0f);
    if (plan_.angles_size > 0) rotation.angles = batch_angles(batch) + plan_.k_angles;
    return rotation;
  }

  // The angles of the keys and queries of batch rows [begin, end).
  void tabulate_batches(int64_t begin, int64_t end) const {
    const int64_t k_blocks = (plan_.max_keys + kBlockKv - 1) / kBlockKv;
    const int64_t num_blocks = k_blocks + (p_.seqlen_q + kBlockKv - 1) / kBlockKv;
    parallel_for(plan_.num_threads, (end - begin) * num_blocks, [&](int64_t task, int) {
      const int64_t batch = begin + task / num_blocks;
      const int64_t block = task % num_blocks;
      if (block < k_blocks) {
        const KeyRange keys = plan_.packed_keys(p_, batch);
        // Packing rotates whole groups of rows.
        const int64_t padded_end = keys.begin + round_up(keys.end - keys.begin, kLanes);
        tabulate_block(rotation_of_keys(batch, 0), keys.begin + block * kBlockKv,
                       std::min(padded_end, p_.seqlen_kv));
      } else {
        tabulate_block(rotation_of_queries(batch, 0), (block - k_blocks) * kBlockKv, p_.seqlen_q);
      }
    });
  }

  static void tabulate_block(const RotaryRows& rows, int64_t first, int64_t end) {
    tabulate_angles(rows, first, std::min(first + kBlockKv, end));
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
      RotaryRows rotation = rotation_of_keys(batch, kv_head);
      if (p_.k_prepared != nullptr) {
        rotation.prepared =
            static_cast<Storage*>(p_.k_prepared) + (first_head + slot) * p_.seqlen_kv * p_.head_dim;
      }
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
      RotaryRows rotation = rotation_of_queries(batch, kv_head);
      if (p_.q_prepared != nullptr) {
        rotation.prepared = static_cast<Storage*>(p_.q_prepared) +
                            (batch * p_.num_heads_q + head) * p_.seqlen_q * p_.head_dim;
      }
      pack_lanes<Dot, kVecCount>(rotation, q, query, packed);
    } else {
      pack_lanes<Dot, kVecCount>(NoPosition{}, q, query, packed);
    }
  }

  const AttentionForwardParams& p_;
  ForwardPlan<Dot> plan_;
  Scratch heads_, tiles_, angles_;
};

inline void forward(const AttentionForwardParams& params, const CpuOptions& options) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Forward<Float32, DotFloat32>(params, options).run();
    case DType::kFloat16:
      return Forward<Float16, DotFloat32>(params, options).run();
    case DType::kBFloat16:
      return Forward<BFloat16, DotForBFloat16>(params, options).run();
  }
}

}  // namespace drope::DROPE_ISA
