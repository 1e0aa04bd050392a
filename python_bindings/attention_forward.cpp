// drope_kernels._C.attention_forward: the CPU forward pass on raw addresses.
#include "attention_arguments.h"
#include "bindings.h"
#include "cpu/attention_cpu.h"

namespace py = pybind11;

namespace drope {
namespace {

void attention_forward(const py::kwargs& arguments) {
  CallArguments in(arguments);
  AttentionForwardParams p;
  read_attention(in, p);
  read_packed(in, p);
  in.tensor("out", p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  p.lse = in.pointer<float>("lse");
  p.softmax_state = in.pointer<float>("softmax_state");
  p.q_prepared = in.pointer<void>("q_prepared");
  p.k_prepared = in.pointer<void>("k_prepared");
  const CpuOptions options{in.value<int>("num_threads")};
  in.finish();
  cpu_kernels();  // reads the environment, which needs the GIL
  py::gil_scoped_release release;
  attention_forward_cpu(p, options);
}

}  // namespace

void register_attention_forward(py::module_& module) {
  module.def("attention_forward", &attention_forward,
             "CPU forward pass; writes out, lse and, where given, softmax_state, "
             "q_prepared and k_prepared.");
}

}  // namespace drope
