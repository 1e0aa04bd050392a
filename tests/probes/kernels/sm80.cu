// Probes of the sm_80 instructions. On later GPUs this file runs through its PTX.
#include "cuda/ptx/address.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/reduce.h"
#include "probe.h"

namespace drope::probes {

enum LdmatrixForm : int { kX2 = 0, kX4 = 1, kX2Trans = 2, kX4Trans = 3 };

// image: 256 16-bit values; offsets: (32) byte offset that each lane passes; out: (32, 4)
__global__ void ldmatrix_kernel(const uint16_t* image, const int32_t* offsets, uint32_t* out,
                                int form) {
  extern __shared__ __align__(1024) unsigned char smem[];
  uint16_t* values = reinterpret_cast<uint16_t*>(smem);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) values[i] = image[i];
  __syncthreads();
  const uint32_t address = ptx::smem_address(smem) + offsets[lane];
  uint32_t x2[2] = {0, 0}, x4[4] = {0, 0, 0, 0};
  if (form == kX2) ptx::ldmatrix_x2(x2, address);
  if (form == kX4) ptx::ldmatrix_x4(x4, address);
  if (form == kX2Trans) ptx::ldmatrix_x2_trans(x2, address);
  if (form == kX4Trans) ptx::ldmatrix_x4_trans(x4, address);
  const bool is_x2 = form == kX2 || form == kX2Trans;
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = !is_x2 ? x4[i] : i < 2 ? x2[i] : 0;
}

// One warp a block. fragments: (blocks, 32, 6) a[4] then b[2]; out: (blocks, 32, 4) float32
__global__ void mma_kernel(const uint32_t* fragments, float* out, int is_float16) {
  const int thread = blockIdx.x * 32 + threadIdx.x;
  const uint32_t* mine = fragments + thread * 6;
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};
  float d[4] = {0, 0, 0, 0};
  if (is_float16) {
    ptx::mma_m16n8k16(ptx::Float16{}, d, a, mine[4], mine[5]);
  } else {
    ptx::mma_m16n8k16(ptx::BFloat16{}, d, a, mine[4], mine[5]);
  }
  for (int i = 0; i < 4; ++i) out[thread * 4 + i] = d[i];
}

// source: (2, 32, 16) bytes; sizes: (32) bytes that each lane reads; out: (2, 32, 16) bytes.
// The first half of out is read when the second group may still be pending.
__global__ void cp_async_kernel(const unsigned char* source, const int32_t* sizes,
                                unsigned char* out) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const int lane = threadIdx.x;
  for (int i = 0; i < 32; ++i) smem[lane * 32 + i] = 0xee;  // anything not overwritten shows
  __syncthreads();
  for (int group = 0; group < 2; ++group) {
    const int offset = group * 512 + lane * 16;
    ptx::cp_async_16(ptx::smem_address(smem + offset), source + offset, sizes[lane]);
    ptx::cp_async_commit_group();
  }
  ptx::cp_async_wait_group<1>();
  __syncthreads();
  for (int i = 0; i < 16; ++i) out[lane * 16 + i] = smem[lane * 16 + i];
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  for (int i = 0; i < 16; ++i) out[512 + lane * 16 + i] = smem[512 + lane * 16 + i];
}

// pairs: (n, 2) float32; out: (n, 3) packed bf16x2, packed f16x2, bits of 2^first
__global__ void convert_kernel(const float* pairs, uint32_t* out, int n) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (i >= n) return;
  const float low = pairs[2 * i], high = pairs[2 * i + 1];
  out[3 * i] = ptx::cvt_rn_x2(ptx::BFloat16{}, low, high);
  out[3 * i + 1] = ptx::cvt_rn_x2(ptx::Float16{}, low, high);
  out[3 * i + 2] = __float_as_uint(ptx::ex2_approx_ftz(low));
}

// halves: (n) float16 bits; out: (n) float32
__global__ void widen_kernel(const uint16_t* halves, float* out, int n) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (i < n) out[i] = ptx::cvt_f32_f16(halves[i]);
}

// values: (blocks, 32); out: (num_slots), to which value i is added at i % num_slots
__global__ void reduce_kernel(const float* values, float* out, int num_slots) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  ptx::red_add_f32(out + i % num_slots, values[i]);
}

// Two producer warps hand values to two consumer warps, rounds times, through one slot: barrier 1
// says full (producers arrive, consumers sync), barrier 2 empty. out: (rounds, 64) int32
__global__ void named_barrier_kernel(int32_t* out, int rounds) {
  extern __shared__ __align__(1024) unsigned char smem[];
  volatile int32_t* slot = reinterpret_cast<volatile int32_t*>(smem);
  const int thread = threadIdx.x & 63;
  const bool is_producer = threadIdx.x < 64;
  for (int round = 0; round < rounds; ++round) {
    if (is_producer) {
      if (round > 0) ptx::bar_sync(2, 128);
      slot[thread] = round * 64 + thread;
      ptx::bar_arrive(1, 128);
    } else {
      ptx::bar_sync(1, 128);
      out[round * 64 + thread] = slot[63 - thread];
      if (round + 1 < rounds) ptx::bar_arrive(2, 128);
    }
  }
}

}  // namespace drope::probes

using namespace drope::probes;

// params: form
extern "C" int probe_ldmatrix(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(ldmatrix_kernel, dim3(1), 32, 1024, device.a.as<uint16_t>(),
                         device.b.as<int32_t>(), device.out.as<uint32_t>(), arguments->params[0]);
  });
}

// params: blocks, is_float16
extern "C" int probe_mma(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(mma_kernel, dim3(arguments->params[0]), 32, 0, device.a.as<uint32_t>(),
                         device.out.as<float>(), arguments->params[1]);
  });
}

extern "C" int probe_cp_async(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(cp_async_kernel, dim3(1), 32, 1024, device.a.as<unsigned char>(),
                         device.b.as<int32_t>(), device.out.as<unsigned char>());
  });
}

// params: n
extern "C" int probe_convert(const ProbeArguments* arguments) {
  const int n = arguments->params[0];
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(convert_kernel, dim3((n + 31) / 32), 32, 0, device.a.as<float>(),
                         device.out.as<uint32_t>(), n);
  });
}

// params: n
extern "C" int probe_widen(const ProbeArguments* arguments) {
  const int n = arguments->params[0];
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(widen_kernel, dim3((n + 31) / 32), 32, 0, device.a.as<uint16_t>(),
                         device.out.as<float>(), n);
  });
}

// params: blocks, num_slots
extern "C" int probe_reduce(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(reduce_kernel, dim3(arguments->params[0]), 32, 0, device.a.as<float>(),
                         device.out.as<float>(), arguments->params[1]);
  });
}

// params: rounds
extern "C" int probe_named_barrier(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(named_barrier_kernel, dim3(1), 128, 1024, device.out.as<int32_t>(),
                         arguments->params[0]);
  });
}
