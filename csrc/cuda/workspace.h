// Device memory that a call needs besides its tensors. The caller allocates it; the same function
// counts the bytes and hands out the pieces.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention_params.h"
#include "cuda/attention/backward/backward_sm80_config.h"
#include "cuda/heuristics.h"

namespace drope::cuda {

// Hands out pieces of one allocation. With a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    const int64_t offset = num_bytes_;
    num_bytes_ += (count * int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  unsigned char* base_;
  int64_t num_bytes_ = 0;
};

// A query besides its channels.
struct alignas(16) QueryTerms {
  float scale_log2;  // scale_i log2(e)
  float row_max;     // a_i
  float log2_sum;    // L_i; inf where no key is seen, or no query is: p is 0 then
  float delta;
};

// What the backward kernels of a call share. The queries of each batch row, or packed sequence,
// begin a block of BLOCK_Q rows of their own, and a head has num_q_blocks of these.
struct BackwardWorkspace {
  bool deterministic = false;  // sums are formed in one order; else grad_q_sum is added to
  int64_t num_q_blocks = 0;
  // dS is rounded to 16 bits between two products as ratio dS, ratio_i = scale_i sqrt(head_dim),
  // whose size does not depend on head_dim: it is 1 where scale_i is the default.
  float ratio_of_scale_log2 = 0.0f;  // sqrt(head_dim) ln 2
  QueryTerms* terms = nullptr;       // (batch, num_heads_q, num_q_blocks * BLOCK_Q)
  // (batch, num_heads_q, num_q_blocks, BLOCK_Q * HEAD_DIM) sums of dq before the rotation is
  // undone, in the order of grad_q.h; null if deterministic.
  float* grad_q_sum = nullptr;
  int64_t grad_q_sum_size = 0;
};

inline BackwardWorkspace backward_workspace(const AttentionBackwardParams& p, bool deterministic,
                                            Workspace& workspace) {
  const int head_dim = head_dim_config(Family::kSm80, p.head_dim, p.head_dim_v);
  const int block_q = backward_block_q(head_dim);
  const int64_t num_seqs = p.cu_seqlens_q != nullptr ? p.num_seqs : 0;
  BackwardWorkspace parts;
  parts.deterministic = deterministic;
  constexpr float kLn2 = 0.693147180559945309f;
  parts.ratio_of_scale_log2 = std::sqrt(static_cast<float>(p.head_dim)) * kLn2;
  parts.num_q_blocks = ceil_div(p.seqlen_q, block_q) + num_seqs;
  const int64_t num_rows = p.batch * p.num_heads_q * parts.num_q_blocks * block_q;
  parts.terms = workspace.take<QueryTerms>(num_rows);
  if (deterministic) return parts;
  parts.grad_q_sum_size = num_rows * head_dim;
  parts.grad_q_sum = workspace.take<float>(parts.grad_q_sum_size);
  return parts;
}

}  // namespace drope::cuda
