// The one way to launch a kernel. Needs nvcc.
#pragma once

#include <cuda_runtime.h>

namespace drope::cuda {

// Launches with dynamic shared memory, also above the 48 KiB that need no permission.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, int num_threads, int smem_bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  const cudaError_t status =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return status;
  }
  kernel<<<grid, num_threads, smem_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace drope::cuda
