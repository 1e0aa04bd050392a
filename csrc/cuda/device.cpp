#include "cuda/device.h"

#include <stdexcept>

namespace drope::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "asking for a device's properties");
  return value;
}

}  // namespace

void check_cuda(cudaError_t status, const std::string& doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(doing + ": " + cudaGetErrorName(status));
}

DeviceProperties device_properties(int device) {
  DeviceProperties properties;
  properties.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                          attribute(cudaDevAttrComputeCapabilityMinor, device);
  properties.num_sms = attribute(cudaDevAttrMultiProcessorCount, device);
  properties.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  properties.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return properties;
}

DeviceProperties current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  // A thread of autograd's may have no context yet: the driver's own functions, which encode tensor
  // maps, want one and make none.
  check_cuda(cudaSetDevice(device), "taking up the current device");
  return device_properties(device);
}

int count_devices(std::string& reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  cudaGetLastError();
  reason = cudaGetErrorName(status);
  return 0;
}

}  // namespace drope::cuda
