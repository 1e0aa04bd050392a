// drope_kernels._C.attention_backward: the CPU backward pass on raw addresses.
#include "attention_arguments.h"
#include "bindings.h"

namespace py = pybind11;

namespace drope {
namespace {

void attention_backward(const py::kwargs& arguments) {
  CallArguments in(arguments);
  AttentionBackwardParams p;
  read_attention(in, p);
  in.tensor("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  in.tensor("grad_out", p.grad_out, p.stride_grad_out_batch, p.stride_grad_out_head,
            p.stride_grad_out_row);
  p.lse = in.pointer<const float>("lse");
  p.grad_lse = in.pointer<const float>("grad_lse");
  in.tensor("grad_q", p.grad_q, p.stride_grad_q_batch, p.stride_grad_q_head, p.stride_grad_q_row);
  in.tensor("grad_k", p.grad_k, p.stride_grad_k_batch, p.stride_grad_k_head, p.stride_grad_k_row);
  in.tensor("grad_v", p.grad_v, p.stride_grad_v_batch, p.stride_grad_v_head, p.stride_grad_v_row);
  p.grad_scale = in.pointer<float>("grad_scale");
  const CpuOptions options{in.value<int>("num_threads")};
  in.finish();
  cpu_kernels();  // reads the environment, which needs the GIL
  py::gil_scoped_release release;
  attention_backward_cpu(p, options);
}

}  // namespace

void register_attention_backward(py::module_& module) {
  module.def("attention_backward", &attention_backward,
             "CPU backward pass; writes grad_q, grad_k, grad_v and, where given, grad_scale.");
}

}  // namespace drope
