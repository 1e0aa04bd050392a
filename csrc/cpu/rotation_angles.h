// How the rows of a forward call rotate, and the angles that all heads of a batch row share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_params.h"
#include "cpu/parallel.h"
#include "cpu/row_stage.h"
#include "cpu/scratch.h"

namespace drope::DROPE_ISA {

// Keys that a batch row needs packed: those some query sees, or all when rotated keys are kept.
inline KeyRange packed_keys(const AttentionForwardParams& p, int64_t batch) {
  return p.k_prepared != nullptr ? KeyRange{0, p.seqlen_kv} : visible_to_any(p, batch);
}

// The most keys that a batch row needs packed.
inline int64_t max_packed_keys(const AttentionForwardParams& p) {
  int64_t most = 0;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const KeyRange keys = packed_keys(p, batch);
    most = std::max(most, keys.end - keys.begin);
  }
  return most;
}

class RotationAngles {
 public:
  // For calls that work on `heads_at_a_time` kv heads together.
  RotationAngles(const AttentionForwardParams& p, int64_t heads_at_a_time)
      : p_(p), max_keys_(max_packed_keys(p)), floats_(0), tables_(place(heads_at_a_time)) {}

  // Evaluates what heads [first, first + count) share, unless an earlier call did.
  void tabulate(int64_t first, int64_t count, int num_threads) {
    const int64_t batch_end = (first + count - 1) / p_.num_heads_kv + 1;
    if (floats_ > 0) tabulate_batches(num_tabulated_, batch_end, num_threads);
    num_tabulated_ = batch_end;
  }

  // Rotated rows are also kept where the call asks for them.
  template <class Element>
  RotaryRows of_keys(int64_t batch, int64_t kv_head) const {
    RotaryRows rows = key_rotation(p_, batch, kv_head, 1.0f);
    if (floats_ > 0) rows.angles = table(batch);
    rows.first_angle = packed_keys(p_, batch).begin;
    if (p_.k_prepared != nullptr) {
      rows.prepared = static_cast<typename Element::Storage*>(p_.k_prepared) +
                      (batch * p_.num_heads_kv + kv_head) * p_.seqlen_kv * p_.head_dim;
    }
    return rows;
  }
  template <class Element>
  RotaryRows of_queries(int64_t batch, int64_t head, int64_t kv_head) const {
    RotaryRows rows = query_rotation(p_, batch, kv_head, 1.0f);
    if (floats_ > 0) rows.angles = table(batch) + key_floats();
    if (p_.q_prepared != nullptr) {
      rows.prepared = static_cast<typename Element::Storage*>(p_.q_prepared) +
                      (batch * p_.num_heads_q + head) * p_.seqlen_q * p_.head_dim;
    }
    return rows;
  }

 private:
  static constexpr int64_t kRowsAtATime = 128;

  // Of the table of a batch row: its keys, then its queries.
  int64_t key_floats() const {
    return round_up(max_keys_, kLanes) * RotaryRows::angle_floats(p_.rotary.rotary_dim);
  }

  int64_t place(int64_t heads_at_a_time) {
    if (p_.rotary.rotary_dim == 0 || p_.rotary.num_tables > 1 || p_.num_heads_q == 1) return 0;
    // Heads packed together may begin and end inside a batch row.
    num_tables_ = std::min(p_.batch, (heads_at_a_time + p_.num_heads_kv - 2) / p_.num_heads_kv + 1);
    floats_ = key_floats() + p_.seqlen_q * RotaryRows::angle_floats(p_.rotary.rotary_dim);
    return num_tables_ * floats_;
  }

  float* table(int64_t batch) const { return tables_.data() + batch % num_tables_ * floats_; }

  void tabulate_batches(int64_t begin, int64_t end, int num_threads) const {
    const int64_t key_blocks = (max_keys_ + kRowsAtATime - 1) / kRowsAtATime;
    const int64_t num_blocks = key_blocks + (p_.seqlen_q + kRowsAtATime - 1) / kRowsAtATime;
    parallel_for(num_threads, (end - begin) * num_blocks, [&](int64_t task, int) {
      const int64_t batch = begin + task / num_blocks, block = task % num_blocks;
      RotaryRows rows;
      int64_t first, last;
      if (block < key_blocks) {
        const KeyRange keys = packed_keys(p_, batch);
        rows = key_rotation(p_, batch, 0, 1.0f);
        rows.angles = table(batch);
        rows.first_angle = keys.begin;
        first = keys.begin + block * kRowsAtATime;
        // Packing rotates whole groups of rows.
        last = std::min(keys.begin + round_up(keys.end - keys.begin, kLanes), p_.seqlen_kv);
      } else {
        rows = query_rotation(p_, batch, 0, 1.0f);
        rows.angles = table(batch) + key_floats();
        first = (block - key_blocks) * kRowsAtATime;
        last = p_.seqlen_q;
      }
      tabulate_angles(rows, first, std::min(first + kRowsAtATime, last));
    });
  }

  const AttentionForwardParams& p_;
  int64_t max_keys_;
  int64_t floats_;  // of a batch row's table; 0: nothing is shared
  int64_t num_tables_ = 1;
  int64_t num_tabulated_ = 0;  // batch rows
  Scratch tables_;
};

}  // namespace drope::DROPE_ISA
