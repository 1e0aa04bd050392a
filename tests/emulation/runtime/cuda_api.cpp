// The CUDA runtime API on the emulated device.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>

#include "device.h"
#include "device_memory.h"
#include "launch.h"

using namespace drope::emulation;

namespace {

constexpr int kMaxThreadsPerSm = 2048, kMaxBlocksPerSm = 32;
constexpr unsigned kReservedSharedBytes = 1024;  // the system's own, in every block

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};

const ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

const ErrorText& error_text(cudaError_t error) {
  static const ErrorText unknown{error, "unknown error", "unknown error"};
  const auto found = std::find_if(std::begin(kErrors), std::end(kErrors),
                                  [=](const ErrorText& one) { return one.error == error; });
  return found == std::end(kErrors) ? unknown : *found;
}

}  // namespace

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = allocate_device(static_cast<int64_t>(bytes));
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer) free_device(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const auto is_device = [=](const void* pointer) {
    return bytes == 0 || is_allocated(pointer, static_cast<int64_t>(bytes));
  };
  if (kind != cudaMemcpyDeviceToHost && !is_device(to)) return cudaErrorInvalidValue;
  if (kind != cudaMemcpyHostToDevice && !is_device(from)) return cudaErrorInvalidValue;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  if (!is_allocated(pointer, static_cast<int64_t>(bytes))) return cudaErrorInvalidValue;
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(pointer, value, bytes);
}

// A launch has ended when it returns.
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  clear_launch_error();
  return error;
}

cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(launch_error()); }

const char* cudaGetErrorName(cudaError_t error) { return error_text(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return error_text(error).text; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMaxBlockThreads;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device().num_sms;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = static_cast<int>(device().l2_bytes);
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = kMaxThreadsPerSm;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device().minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(device().shared_bytes + kReservedSharedBytes);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(device().shared_bytes);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // hints
  if (value < 0 || value > static_cast<int>(device().shared_bytes)) return cudaErrorInvalidValue;
  allow_shared_bytes(kernel, static_cast<unsigned>(value));
  return cudaSuccess;
}

// Registers do not count here: the true number may be smaller.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, const void*,
                                                          int block_size, size_t shared_bytes) {
  if (block_size < 1) return cudaErrorInvalidValue;
  const size_t of_sm = device().shared_bytes + kReservedSharedBytes;
  const int by_memory = static_cast<int>(of_sm / (shared_bytes + kReservedSharedBytes));
  *num_blocks = std::min({by_memory, kMaxThreadsPerSm / block_size, kMaxBlocksPerSm});
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool is_known = std::string(name) == "cuTensorMapEncodeTiled";
  *entry = is_known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
