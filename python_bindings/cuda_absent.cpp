// Stands in for cuda.cpp in a build without CUDA kernels: no function of theirs is registered, and
// build_info() says why.
#include "bindings.h"

namespace drope {

void register_cuda(pybind11::module_&) {}

}  // namespace drope
