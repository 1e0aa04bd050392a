// The Python module emulated_cuda: the CUDA functions of drope_kernels._C, on the emulated device.
#include <pybind11/pybind11.h>

namespace drope {

void register_cuda(pybind11::module_& module);

}  // namespace drope

PYBIND11_MODULE(emulated_cuda, module) { drope::register_cuda(module); }
