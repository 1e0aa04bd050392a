// What nvcc must be able to build before the CUDA kernels are: a kernel, a launch, and a driver
// function found without linking the driver.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

__global__ void write_one(int* destination) { *destination = 1; }

cudaError_t launch_and_find(int* destination, PFN_cuTensorMapEncodeTiled_v12000* encode) {
  write_one<<<1, 1>>>(destination);
  cudaDriverEntryPointQueryResult found;
  return cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", reinterpret_cast<void**>(encode), 12000, cudaEnableDefault, &found);
}
