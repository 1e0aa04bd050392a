// What the runtime says about the device in use, and how its errors become exceptions.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/heuristics.h"

namespace drope::cuda {

// Throws std::runtime_error "<doing>: <CUDA error name>" unless status is success. Clears the
// runtime's note of the error, so that the next call starts clean.
void check_cuda(cudaError_t status, const std::string& doing);

DeviceProperties device_properties(int device);
// Of the calling thread's current device, whose context is then current as well.
DeviceProperties current_device();

// Number of devices, 0 with a CUDA error name in `reason` when there are none.
int count_devices(std::string& reason);

}  // namespace drope::cuda
