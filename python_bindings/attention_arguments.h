// Keyword arguments of a Python call as the parameters of a kernel.
//
// A tensor of four dimensions is a tuple (address, stride_batch, stride_head, stride_row), any
// other is its address; 0 means absent. Nothing is checked here but names and kinds: Python already
// did.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "attention_params.h"

namespace drope {

// Reads keyword arguments; `finish` complains about those that nobody read.
class CallArguments {
 public:
  explicit CallArguments(const pybind11::kwargs& arguments) : arguments_(arguments) {}

  template <class T>
  T value(const char* name) {
    // Not through arguments_.contains, a Python call: small attention calls would notice dozens.
    const pybind11::handle argument = PyDict_GetItemString(arguments_.ptr(), name);
    if (!argument) throw pybind11::type_error(std::string("missing argument '") + name + "'");
    ++num_read_;
    return argument.cast<T>();
  }

  template <class T>
  T* pointer(const char* name) {
    return reinterpret_cast<T*>(value<uintptr_t>(name));
  }

  template <class T>
  void tensor(const char* name, T*& data, int64_t& stride_batch, int64_t& stride_head,
              int64_t& stride_row) {
    const auto tuple = value<pybind11::tuple>(name);
    data = reinterpret_cast<T*>(tuple[0].cast<uintptr_t>());
    stride_batch = tuple[1].cast<int64_t>();
    stride_head = tuple[2].cast<int64_t>();
    stride_row = tuple[3].cast<int64_t>();
  }

  void finish() const {
    if (num_read_ != arguments_.size()) {
      throw pybind11::type_error("unexpected argument among " +
                                 pybind11::repr(arguments_.attr("keys")()).cast<std::string>());
    }
  }

 private:
  const pybind11::kwargs& arguments_;
  std::size_t num_read_ = 0;
};

// What every call has.
inline void read_attention(CallArguments& in, AttentionParams& p) {
  p.dtype = static_cast<DType>(in.value<int>("dtype"));
  const auto shape = in.value<pybind11::tuple>("shape");
  int64_t* const sizes[] = {&p.batch,     &p.num_heads_q, &p.num_heads_kv, &p.seqlen_q,
                            &p.seqlen_kv, &p.head_dim,    &p.head_dim_v};
  for (std::size_t i = 0; i < 7; ++i) *sizes[i] = shape[i].cast<int64_t>();
  in.tensor("q", p.q, p.stride_q_batch, p.stride_q_head, p.stride_q_row);
  in.tensor("k", p.k, p.stride_k_batch, p.stride_k_head, p.stride_k_row);
  in.tensor("v", p.v, p.stride_v_batch, p.stride_v_head, p.stride_v_row);
  p.scale = in.value<float>("scale");
  in.tensor("scale_rows", p.scale_rows, p.stride_scale_batch, p.stride_scale_head,
            p.stride_scale_row);
  p.softcap = in.value<float>("softcap");
  p.mask.causal = in.value<bool>("causal");
  p.mask.window = in.value<int64_t>("window");
  p.mask.q_start = in.pointer<const int32_t>("q_start");
  p.mask.q_offset = in.value<int64_t>("q_offset");
  p.mask.kv_start = in.pointer<const int32_t>("kv_start");
  p.mask.kv_end = in.pointer<const int32_t>("kv_end");

  RotaryParams& r = p.rotary;
  r.rotary_dim = in.value<int64_t>("rotary_dim");
  r.interleaved = in.value<bool>("interleaved");
  r.attention_factor = in.value<float>("attention_factor");
  r.num_tables = in.value<int64_t>("num_tables");
  r.turns_hi = in.pointer<const float>("turns_hi");
  r.turns_lo = in.pointer<const float>("turns_lo");
  r.positions = in.pointer<const float>("positions");
  r.kv_positions = in.pointer<const float>("kv_positions");
  r.stride_positions_batch = in.value<int64_t>("stride_positions_batch");
  r.stride_kv_positions_batch = in.value<int64_t>("stride_kv_positions_batch");
}

// Packed calls; addresses of 0 in others.
inline void read_packed(CallArguments& in, AttentionParams& p) {
  p.cu_seqlens_q = in.pointer<const int32_t>("cu_seqlens_q");
  p.cu_seqlens_k = in.pointer<const int32_t>("cu_seqlens_k");
  p.num_seqs = in.value<int64_t>("num_seqs");
}

// What backward calls have beyond it.
inline void read_gradients(CallArguments& in, AttentionBackwardParams& p) {
  in.tensor("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  in.tensor("grad_out", p.grad_out, p.stride_grad_out_batch, p.stride_grad_out_head,
            p.stride_grad_out_row);
  p.softmax_state = in.pointer<const float>("softmax_state");
  p.grad_lse = in.pointer<const float>("grad_lse");
  in.tensor("grad_q", p.grad_q, p.stride_grad_q_batch, p.stride_grad_q_head, p.stride_grad_q_row);
  in.tensor("grad_k", p.grad_k, p.stride_grad_k_batch, p.stride_grad_k_head, p.stride_grad_k_row);
  in.tensor("grad_v", p.grad_v, p.stride_grad_v_batch, p.stride_grad_v_head, p.stride_grad_v_row);
  p.grad_scale = in.pointer<float>("grad_scale");
}

// What decode calls have beyond it; k and v are the caches.
inline void read_decode(CallArguments& in, AttentionDecodeParams& p) {
  p.k_cache = const_cast<void*>(p.k);
  p.v_cache = const_cast<void*>(p.v);
  p.rotated_cache = in.value<bool>("rotated_cache");
  p.cache_seqlens = in.pointer<const int32_t>("cache_seqlens");
  p.page_table = in.pointer<const int32_t>("page_table");
  p.stride_page_table_batch = in.value<int64_t>("stride_page_table_batch");
  const auto pages = in.value<pybind11::tuple>("pages");
  p.num_pages = pages[0].cast<int64_t>();
  p.page_size = pages[1].cast<int64_t>();
  p.pages_per_row = pages[2].cast<int64_t>();
  p.seqlen_new = in.value<int64_t>("seqlen_new");
  in.tensor("k_new", p.k_new, p.stride_k_new_batch, p.stride_k_new_head, p.stride_k_new_row);
  in.tensor("v_new", p.v_new, p.stride_v_new_batch, p.stride_v_new_head, p.stride_v_new_row);
  in.tensor("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  p.lse = in.pointer<float>("lse");
}

}  // namespace drope
