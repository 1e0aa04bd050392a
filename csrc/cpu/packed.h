// Packed calls on the CPU: each sequence is a call of its own, on a part of the same arrays.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_params.h"
#include "cpu/attention_cpu.h"
#include "cpu/parallel.h"

namespace drope {

// The call that attends sequence `s` of a packed one.
AttentionForwardParams sequence_of(const AttentionForwardParams& packed, int64_t s);
AttentionBackwardParams sequence_of(const AttentionBackwardParams& packed, int64_t s);

// Runs `attend`, a kernel, on every sequence. One that would keep others waiting has all threads
// for itself; the rest are worked on side by side, a thread each.
template <class Params>
void attend_packed(const Params& packed, const CpuOptions& options,
                   void (*attend)(const Params&, const CpuOptions&)) {
  const auto pairs_of = [&packed](int64_t s) {
    const int64_t queries = packed.cu_seqlens_q[s + 1] - packed.cu_seqlens_q[s];
    const int64_t keys = packed.cu_seqlens_k[s + 1] - packed.cu_seqlens_k[s];
    return (queries + 1) * (keys + 1);  // an empty sequence has gradients to clear
  };
  int64_t all_pairs = 0;
  for (int64_t s = 0; s < packed.num_seqs; ++s) all_pairs += pairs_of(s);
  std::vector<int64_t> side_by_side;
  for (int64_t s = 0; s < packed.num_seqs; ++s) {
    if (2 * options.num_threads * pairs_of(s) > all_pairs) {
      attend(sequence_of(packed, s), options);
    } else {
      side_by_side.push_back(s);
    }
  }
  CpuOptions alone = options;
  alone.num_threads = 1;
  parallel_for(options.num_threads, static_cast<int64_t>(side_by_side.size()),
               [&](int64_t task, int) {
                 attend(sequence_of(packed, side_by_side[static_cast<std::size_t>(task)]), alone);
               });
}

}  // namespace drope
