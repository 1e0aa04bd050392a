#include "cuda/check_params.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/heuristics.h"

namespace drope::cuda {
namespace {

constexpr int64_t kVector = 8;  // elements of a 16-byte copy
constexpr int64_t kSmallestBlockQ = 16;

void require(bool holds, const std::string& complaint) {
  if (!holds) throw std::invalid_argument("CUDA kernels: " + complaint);
}

void check_size(const char* name, int64_t size, int64_t low, int64_t high) {
  require(low <= size && size <= high, std::string(name) + " is " + std::to_string(size) +
                                           ", expected " + std::to_string(low) + " to " +
                                           std::to_string(high));
}

// extents: of batch, heads, rows. A stride that no second index uses may be anything.
struct Layout {
  int64_t batch, heads, rows;

  void check(const char* name, const void* data, int64_t stride_batch, int64_t stride_head,
             int64_t stride_row) const {
    if (batch == 0 || heads == 0 || rows == 0) return;
    const bool is_aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                            (batch == 1 || stride_batch % kVector == 0) &&
                            (heads == 1 || stride_head % kVector == 0) &&
                            (rows == 1 || stride_row % kVector == 0);
    require(data != nullptr && is_aligned,
            std::string(name) + " needs a 16-byte aligned address and strides that are multiples " +
                "of 8 elements");
  }
};

void check_sizes(const AttentionParams& p) {
  require(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16,
          "they compute float16 and bfloat16");
  require(p.softcap == 0.0f, "they have no softcap");
  check_size("seqlen_q", p.seqlen_q, 0, kMaxSeqlen);
  check_size("seqlen_kv", p.seqlen_kv, 0, kMaxSeqlen);
  check_size("num_heads_kv", p.num_heads_kv, 1, kMaxSeqlen);
  check_size("num_heads_q", p.num_heads_q, 1, kMaxSeqlen);
  check_size("batch", p.batch, 0, kMaxSeqlen);
  check_size("head_dim", p.head_dim, 1, 256);
  check_size("head_dim_v", p.head_dim_v, 1, 256);
  require(p.num_heads_q % p.num_heads_kv == 0, "num_heads_q is no multiple of num_heads_kv");
  require(p.head_dim % kVector == 0 && p.head_dim_v % kVector == 0,
          "head_dim and head_dim_v are multiples of 8");
  require(
      p.rotary.rotary_dim % 2 == 0 && 0 <= p.rotary.rotary_dim && p.rotary.rotary_dim <= p.head_dim,
      "rotary_dim is even and at most head_dim");
  require(
      p.rotary.rotary_dim == 0 || p.rotary.num_tables == 1 || p.rotary.num_tables == p.num_heads_kv,
      "there is one rotation table, or one for each kv head");
  const bool is_packed = p.cu_seqlens_q != nullptr;
  require(is_packed == (p.cu_seqlens_k != nullptr) && (!is_packed || p.batch == 1),
          "packed calls have both cu_seqlens and a batch of 1");

  // In double: the product may not fit an integer.
  const auto tiles = [](int64_t rows) { return static_cast<double>(rows / kSmallestBlockQ + 1); };
  const double num_sequences = static_cast<double>(is_packed ? p.num_seqs : p.batch);
  const double num_tiles =
      (tiles(std::max(p.seqlen_q, p.seqlen_kv)) + (is_packed ? num_sequences : 0)) *
      static_cast<double>(p.num_heads_q) * (is_packed ? 1.0 : num_sequences);
  require(num_tiles <= static_cast<double>(kMaxGridBlocks),
          "batch * heads * rows / 16 is at most 2**31 - 1, the size of a grid");
}

Layout rows_q(const AttentionParams& p) { return {p.batch, p.num_heads_q, p.seqlen_q}; }
Layout rows_kv(const AttentionParams& p) { return {p.batch, p.num_heads_kv, p.seqlen_kv}; }

void check_inputs(const AttentionParams& p) {
  check_sizes(p);
  rows_q(p).check("q", p.q, p.stride_q_batch, p.stride_q_head, p.stride_q_row);
  rows_kv(p).check("k", p.k, p.stride_k_batch, p.stride_k_head, p.stride_k_row);
  rows_kv(p).check("v", p.v, p.stride_v_batch, p.stride_v_head, p.stride_v_row);
}

}  // namespace

void check_params(const AttentionForwardParams& p) {
  check_inputs(p);
  rows_q(p).check("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
}

void check_params(const AttentionBackwardParams& p) {
  check_inputs(p);
  rows_q(p).check("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  rows_q(p).check("grad_out", p.grad_out, p.stride_grad_out_batch, p.stride_grad_out_head,
                  p.stride_grad_out_row);
  rows_q(p).check("grad_q", p.grad_q, p.stride_grad_q_batch, p.stride_grad_q_head,
                  p.stride_grad_q_row);
  rows_kv(p).check("grad_k", p.grad_k, p.stride_grad_k_batch, p.stride_grad_k_head,
                   p.stride_grad_k_row);
  rows_kv(p).check("grad_v", p.grad_v, p.stride_grad_v_batch, p.stride_grad_v_head,
                   p.stride_grad_v_row);
}

void check_params(const AttentionDecodeParams& p) {
  check_sizes(p);
  rows_q(p).check("q", p.q, p.stride_q_batch, p.stride_q_head, p.stride_q_row);
  rows_q(p).check("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  const bool is_paged = p.page_table != nullptr;
  require(!is_paged || p.seqlen_kv == p.page_size * p.pages_per_row,
          "seqlen_kv is page_size * pages_per_row");
  const Layout cache = is_paged ? Layout{p.num_pages, p.num_heads_kv, p.page_size} : rows_kv(p);
  cache.check("k_cache", p.k_cache, p.stride_k_batch, p.stride_k_head, p.stride_k_row);
  cache.check("v_cache", p.v_cache, p.stride_v_batch, p.stride_v_head, p.stride_v_row);
  const Layout added{p.batch, p.num_heads_kv, p.seqlen_new};
  check_size("seqlen_new", p.seqlen_new, 0, kMaxSeqlen);
  added.check("k", p.k_new, p.stride_k_new_batch, p.stride_k_new_head, p.stride_k_new_row);
  added.check("v", p.v_new, p.stride_v_new_batch, p.stride_v_new_head, p.stride_v_new_row);
}

}  // namespace drope::cuda
