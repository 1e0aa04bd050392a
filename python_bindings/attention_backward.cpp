// drope_kernels._C.attention_backward: the CPU backward pass on raw addresses.
#include "attention_arguments.h"
#include "bindings.h"
#include "cpu/attention_cpu.h"

namespace py = pybind11;

namespace drope {
namespace {

void attention_backward(const py::kwargs& arguments) {
  CallArguments in(arguments);
  AttentionBackwardParams p;
  read_attention(in, p);
  read_packed(in, p);
  read_gradients(in, p);
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
