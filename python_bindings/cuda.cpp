// The CUDA part of drope_kernels._C; builds without CUDA link cuda_absent.cpp instead.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda/device.h"
#include "cuda_arguments.h"

namespace py = pybind11;

namespace drope {
namespace {

int cuda_device_count() {
  std::string reason;
  const int count = cuda::count_devices(reason);
  if (!reason.empty()) throw std::runtime_error(reason);
  return count;
}

py::dict cuda_device(int index) {
  const cuda::DeviceProperties properties = cuda::device_properties(index);
  py::dict result;
  result["capability"] = py::make_tuple(properties.capability / 10, properties.capability % 10);
  result["num_sms"] = properties.num_sms;
  result["l2_bytes"] = properties.l2_bytes;
  result["shared_bytes"] = properties.shared_bytes;
  return result;
}

}  // namespace

void register_cuda(py::module_& module) {
  module.def("cuda_device_count", &cuda_device_count,
             "Number of CUDA devices; RuntimeError with the CUDA error's name when there are none "
             "or no driver.");
  module.def("cuda_device", &cuda_device, py::arg("index"),
             "dict: capability (major, minor), num_sms, l2_bytes, shared_bytes.");
  register_cuda_attention_backward(module);
  register_cuda_attention_decode(module);
  register_cuda_attention_forward(module);
}

}  // namespace drope
