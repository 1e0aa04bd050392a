// Warp functions, and what they do not order.
#include "../../probes/kernels/probe.h"
#include "cuda/ptx/address.h"

namespace drope::probes {

// Every lane takes its neighbour's value through shared memory: ordered by __syncwarp or, wrongly,
// by a shuffle. out: (3, 32) the neighbour's value, the warp's maximum, the ballot of odd values
__global__ void warp_kernel(const int32_t* values, int32_t* out, int is_ordered) {
  extern __shared__ __align__(1024) unsigned char smem[];
  int32_t* exchanged = reinterpret_cast<int32_t*>(smem);
  const int lane = threadIdx.x;
  int32_t largest = values[lane];
  exchanged[lane] = largest;
  if (is_ordered) __syncwarp();
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const int32_t other = __shfl_xor_sync(0xffffffffu, largest, lanes);
    largest = other > largest ? other : largest;
  }
  out[lane] = exchanged[lane ^ 1];
  out[32 + lane] = largest;
  out[64 + lane] = static_cast<int32_t>(__ballot_sync(0xffffffffu, values[lane] & 1));
}

// Starts past the end of shared memory when offset is 1024. out: (1) int32
__global__ void shared_bounds_kernel(int32_t* out, int offset) {
  extern __shared__ __align__(1024) unsigned char smem[];
  out[0] = *reinterpret_cast<int32_t*>(smem + offset);
}

}  // namespace drope::probes

using namespace drope::probes;

// params: is_ordered
extern "C" int emulation_warp(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(warp_kernel, dim3(1), 32, 1024, device.a.as<int32_t>(),
                         device.out.as<int32_t>(), arguments->params[0]);
  });
}

// params: offset
extern "C" int emulation_shared_bounds(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(shared_bounds_kernel, dim3(1), 32, 1024, device.out.as<int32_t>(),
                         arguments->params[0]);
  });
}
