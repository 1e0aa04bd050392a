// drope_kernels._C.cuda_attention_backward: the CUDA backward pass on device addresses.
#include "cuda_arguments.h"

namespace py = pybind11;

namespace drope {
namespace {

void cuda_attention_backward(const py::kwargs& arguments) {
  CallArguments in(arguments);
  AttentionBackwardParams p;
  read_attention(in, p);
  read_packed(in, p);
  read_gradients(in, p);
  CudaLaunch launch(in);
  in.finish();
  launch.run(p, &cuda::attention_backward_workspace_bytes, &cuda::attention_backward_cuda);
}

}  // namespace

void register_cuda_attention_backward(py::module_& module) {
  module.def("cuda_attention_backward", &cuda_attention_backward,
             "CUDA backward pass, asynchronous on the stream; writes grad_q, grad_k, grad_v and, "
             "where given, grad_scale.");
}

}  // namespace drope
