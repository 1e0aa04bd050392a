// What every layout probe shares: one C function per probe, host buffers in, one launch, one host
// buffer out. Loaded by layout.py through ctypes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

extern "C" {

struct ProbeArguments {
  const void* a;  // first input
  const void* b;  // second input; may be null
  void* out;      // in: what the device buffer holds before the launch; out: after it
  int64_t a_bytes, b_bytes, out_bytes;
  const int32_t* params;
};

}  // extern "C"

namespace drope::probes {

// Device copy of a host buffer.
class DeviceBuffer {
 public:
  DeviceBuffer(const void* host, int64_t bytes) {
    if (bytes == 0) return;
    status_ = cudaMalloc(&data_, bytes);
    if (status_ == cudaSuccess) status_ = cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice);
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  cudaError_t status() const { return status_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  cudaError_t status_ = cudaSuccess;
};

struct DeviceArguments {
  DeviceBuffer a, b, out;
};

// Uploads, calls launch(DeviceArguments) -> cudaError_t, waits, downloads. Returns a cudaError_t.
template <typename Launch>
int run_probe(const ProbeArguments& arguments, Launch launch) {
  DeviceArguments device{{arguments.a, arguments.a_bytes},
                         {arguments.b, arguments.b_bytes},
                         {arguments.out, arguments.out_bytes}};
  for (const DeviceBuffer* buffer : {&device.a, &device.b, &device.out}) {
    if (buffer->status() != cudaSuccess) return buffer->status();
  }
  cudaError_t status = launch(device);
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  if (status != cudaSuccess) return status;
  return cudaMemcpy(arguments.out, device.out.as<void>(), arguments.out_bytes,
                    cudaMemcpyDeviceToHost);
}

// Launches with dynamic shared memory, also above the 48 KiB default.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int num_threads, int smem_bytes,
                          Arguments... arguments) {
  const cudaError_t status =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (status != cudaSuccess) return status;
  kernel<<<grid, num_threads, smem_bytes>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace drope::probes
