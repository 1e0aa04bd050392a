// One register function per op, each defined in the file of its name and called by module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace drope {

void register_attention_backward(pybind11::module_& module);
void register_attention_decode(pybind11::module_& module);
void register_attention_forward(pybind11::module_& module);
void register_attention_repeated(pybind11::module_& module);
void register_build_info(pybind11::module_& module);
void register_cpu_isa(pybind11::module_& module);
// The functions of cuda_attention_*.cpp; none in a CPU-only build.
void register_cuda(pybind11::module_& module);

}  // namespace drope
