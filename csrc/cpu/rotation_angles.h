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
      : p_(p), tables_(place(heads_at_a_time)) {}

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
    if (floats_ > 0) point_to_keys(batch, rows);
    if (p_.k_prepared != nullptr) {
      rows.prepared = static_cast<typename Element::Storage*>(p_.k_prepared) +
                      (batch * p_.num_heads_kv + kv_head) * p_.head_rows_kv() * p_.head_dim;
    }
    return rows;
  }
  template <class Element>
  RotaryRows of_queries(int64_t batch, int64_t head, int64_t kv_head) const {
    RotaryRows rows = query_rotation(p_, batch, kv_head, 1.0f);
    if (floats_ > 0) point_to_queries(batch, rows);
    if (p_.q_prepared != nullptr) {
      rows.prepared = static_cast<typename Element::Storage*>(p_.q_prepared) +
                      (batch * p_.num_heads_q + head) * p_.head_rows_q() * p_.head_dim;
    }
    return rows;
  }

 private:
  static constexpr int64_t kRowsAtATime = 128;

  // Keys of a batch row whose angles packing reads: it rotates whole groups of rows.
  KeyRange keys_of(int64_t batch) const {
    const KeyRange keys = packed_keys(p_, batch);
    return {keys.begin,
            std::min(keys.begin + round_up(keys.end - keys.begin, kLanes), p_.seqlen_kv)};
  }

  // Positions of a batch row's keys and queries, where those are their indices.
  KeyRange positions_of(int64_t batch) const {
    const KeyRange keys = keys_of(batch);
    const int64_t first_query = query_start(p_.mask, batch);
    return {std::min(keys.begin, first_query), std::max(keys.end, first_query + p_.seqlen_q)};
  }

  int64_t place(int64_t heads_at_a_time) {
    if (p_.rotary.rotary_dim == 0 || p_.rotary.num_tables > 1 || p_.num_heads_q == 1) return 0;
    // Heads packed together may begin and end inside a batch row.
    num_tables_ = std::min(p_.batch, (heads_at_a_time + p_.num_heads_kv - 2) / p_.num_heads_kv + 1);
    int64_t most_positions = 0;
    for (int64_t batch = 0; batch < p_.batch; ++batch) {
      const KeyRange keys = keys_of(batch), both = positions_of(batch);
      num_keys_ = std::max(num_keys_, keys.end - keys.begin);
      most_positions = std::max(most_positions, both.end - both.begin);
    }
    // Mostly queries stand among the keys: then one angle serves both.
    num_rows_ = num_keys_ + p_.seqlen_q;
    one_row_a_position_ = p_.rotary.positions == nullptr && p_.rotary.kv_positions == nullptr &&
                          most_positions <= num_rows_;
    if (one_row_a_position_) num_rows_ = num_keys_ = most_positions;
    floats_ = num_rows_ * RotaryRows::angle_floats(p_.rotary.rotary_dim);
    return num_tables_ * floats_;
  }

  float* table(int64_t batch) const { return tables_.data() + batch % num_tables_ * floats_; }

  void point_to_keys(int64_t batch, RotaryRows& rows) const {
    rows.angles = table(batch);
    rows.first_angle = one_row_a_position_ ? positions_of(batch).begin : keys_of(batch).begin;
  }

  void point_to_queries(int64_t batch, RotaryRows& rows) const {
    rows.angles = table(batch);
    if (one_row_a_position_) {
      rows.first_angle = positions_of(batch).begin - query_start(p_.mask, batch);
    } else {
      rows.first_angle = -num_keys_;  // behind those of the keys
    }
  }

  void tabulate_batches(int64_t begin, int64_t end, int num_threads) const {
    const int64_t key_blocks = (num_keys_ + kRowsAtATime - 1) / kRowsAtATime;
    const int64_t query_blocks =
        one_row_a_position_ ? 0 : (p_.seqlen_q + kRowsAtATime - 1) / kRowsAtATime;
    const int64_t num_blocks = key_blocks + query_blocks;
    parallel_for(num_threads, (end - begin) * num_blocks, [&](int64_t task, int) {
      const int64_t batch = begin + task / num_blocks, block = task % num_blocks;
      const bool of_keys = block < key_blocks;
      RotaryRows rows =
          of_keys ? key_rotation(p_, batch, 0, 1.0f) : query_rotation(p_, batch, 0, 1.0f);
      KeyRange range{0, p_.seqlen_q};
      if (of_keys) {
        point_to_keys(batch, rows);
        range = one_row_a_position_ ? positions_of(batch) : keys_of(batch);
      } else {
        point_to_queries(batch, rows);
      }
      const int64_t first = range.begin + (of_keys ? block : block - key_blocks) * kRowsAtATime;
      tabulate_angles(rows, first, std::min(first + kRowsAtATime, range.end));
    });
  }

  const AttentionForwardParams& p_;
  int64_t floats_ = 0;                   // of a batch row's table; 0: nothing is shared
  int64_t num_keys_ = 0, num_rows_ = 0;  // of a table: of its keys, and of queries behind them
  bool one_row_a_position_ = false;      // else a row for each key, then one for each query
  int64_t num_tables_ = 1;
  int64_t num_tabulated_ = 0;  // batch rows
  Scratch tables_;
};

}  // namespace drope::DROPE_ISA
