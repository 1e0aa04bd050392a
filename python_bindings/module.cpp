// The Python module drope_kernels._C: ints and pointers in, no torch.
#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of drope_kernels. Use drope_kernels.attention, not this module.";
  drope::register_attention_backward(module);
  drope::register_attention_decode(module);
  drope::register_attention_forward(module);
  drope::register_attention_repeated(module);
  drope::register_build_info(module);
  drope::register_cpu_isa(module);
  drope::register_cuda(module);
}
