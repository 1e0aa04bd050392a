// Global memory: vectors, reductions, atomics, and accesses that no allocation holds.
#include "../../probes/kernels/probe.h"
#include "cuda/ptx/reduce.h"

namespace drope::probes {

// Through shared memory to the neighbour's place, 16 bytes at a time. values, out: (32) float4
__global__ void vector_kernel(const float4* values, float4* out, int offset) {
  extern __shared__ __align__(1024) unsigned char smem[];
  float4* exchanged = reinterpret_cast<float4*>(smem);
  const int lane = static_cast<int>(threadIdx.x);
  const auto* from = reinterpret_cast<const unsigned char*>(values + lane) + offset;
  exchanged[lane ^ 1] = *reinterpret_cast<const float4*>(from);
  __syncwarp();
  out[lane] = exchanged[lane];
}

// Every thread of every block adds to out: (0) its value, (1, 2) it and twice it, (4..7) it; an
// atomic counter in (8) hands out tickets whose largest goes to (9). Lanes get their neighbours'
// values, below (16) and above (48). out: (80) float32
__global__ void reduce_kernel(const float* values, float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const float x = values[lane];
  ptx::red_add_f32(out, x);
  ptx::red_add_v2_f32(out + 2, x, 2 * x);
  ptx::red_add_v4_f32(out + 4, x, x, x, x);
  const float ticket = atomicAdd(out + 8, 1.0f);
  out[9] = ticket;
  out[16 + lane] = __shfl_up_sync(0xffffffffu, x, 1);
  out[48 + lane] = __shfl_down_sync(0xffffffffu, x, 3);
}

__global__ void host_memory_kernel(const float* host, float* out) { out[0] = host[0]; }

}  // namespace drope::probes

using namespace drope::probes;

// params: bytes to be off by
extern "C" int emulation_vector(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(vector_kernel, dim3(1), 32, 512, device.a.as<float4>(),
                         device.out.as<float4>(), arguments->params[0]);
  });
}

// params: blocks in x, y, z
extern "C" int emulation_reduce(const ProbeArguments* arguments) {
  const int32_t* size = arguments->params;
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(reduce_kernel, dim3(size[0], size[1], size[2]), 32, 0,
                         device.a.as<float>(), device.out.as<float>());
  });
}

// The host's buffer in place of the device's copy.
extern "C" int emulation_host_memory(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(host_memory_kernel, dim3(1), 32, 0,
                         static_cast<const float*>(arguments->a), device.out.as<float>());
  });
}

// params: threads, dynamic shared bytes, whether the function attribute allows them
extern "C" int emulation_launch(const ProbeArguments* arguments) {
  const int32_t* params = arguments->params;
  return run_probe(*arguments, [&](const DeviceArguments& device) -> cudaError_t {
    if (params[2] != 0) {
      return launch_kernel(host_memory_kernel, dim3(1), params[0], params[1],
                           device.out.as<float>(), device.out.as<float>());
    }
    host_memory_kernel<<<1, params[0], params[1]>>>(device.out.as<float>(), device.out.as<float>());
    return cudaGetLastError();
  });
}
