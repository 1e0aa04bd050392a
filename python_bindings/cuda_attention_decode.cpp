// drope_kernels._C.cuda_attention_decode: append and attend on device addresses.
#include "cuda_arguments.h"

namespace py = pybind11;

namespace drope {
namespace {

void read_cache(CallArguments& in, AttentionDecodeParams& p) {
  p.k_cache = const_cast<void*>(p.k);
  p.v_cache = const_cast<void*>(p.v);
  p.rotated_cache = in.value<bool>("rotated_cache");
  p.cache_seqlens = in.pointer<const int32_t>("cache_seqlens");
  p.page_table = in.pointer<const int32_t>("page_table");
  p.stride_page_table_batch = in.value<int64_t>("stride_page_table_batch");
  const auto pages = in.value<py::tuple>("pages");
  p.num_pages = pages[0].cast<int64_t>();
  p.page_size = pages[1].cast<int64_t>();
  p.pages_per_row = pages[2].cast<int64_t>();
  p.seqlen_new = in.value<int64_t>("seqlen_new");
  in.tensor("k_new", p.k_new, p.stride_k_new_batch, p.stride_k_new_head, p.stride_k_new_row);
  in.tensor("v_new", p.v_new, p.stride_v_new_batch, p.stride_v_new_head, p.stride_v_new_row);
}

void cuda_attention_decode(const py::kwargs& arguments) {
  CallArguments in(arguments);
  AttentionDecodeParams p;
  read_attention(in, p);  // k and v are the caches
  read_cache(in, p);
  in.tensor("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  p.lse = in.pointer<float>("lse");
  CudaLaunch launch(in);
  in.finish();
  launch.run(p, &cuda::attention_decode_workspace_bytes, &cuda::attention_decode_cuda);
}

}  // namespace

void register_cuda_attention_decode(py::module_& module) {
  module.def("cuda_attention_decode", &cuda_attention_decode,
             "CUDA decode, asynchronous on the stream; writes out, lse and the new rows of the "
             "caches.");
}

}  // namespace drope
