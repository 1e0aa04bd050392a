// drope_kernels._C.cuda_attention_forward: the CUDA forward pass on device addresses.
#include "cuda_arguments.h"

namespace py = pybind11;

namespace drope {
namespace {

void cuda_attention_forward(const py::kwargs& arguments) {
  CallArguments in(arguments);
  AttentionForwardParams p;
  read_attention(in, p);
  read_packed(in, p);
  in.tensor("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  p.lse = in.pointer<float>("lse");
  p.softmax_state = in.pointer<float>("softmax_state");
  p.q_prepared = in.pointer<void>("q_prepared");
  p.k_prepared = in.pointer<void>("k_prepared");
  CudaLaunch launch(in);
  in.finish();
  launch.run(p, &cuda::attention_forward_workspace_bytes, &cuda::attention_forward_cuda);
}

}  // namespace

void register_cuda_attention_forward(py::module_& module) {
  module.def("cuda_attention_forward", &cuda_attention_forward,
             "CUDA forward pass, asynchronous on the stream; writes out, lse and, where given, "
             "softmax_state, q_prepared and k_prepared.");
}

}  // namespace drope
