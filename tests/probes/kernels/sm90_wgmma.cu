// Probes of wgmma: one warpgroup multiplies operands that the host laid out byte by byte.
#include "cuda/ptx/address.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/matrix_descriptor.h"
#include "cuda/ptx/wgmma_bf16.h"
#include "cuda/ptx/wgmma_f16.h"
#include "cuda/ptx/wgmma_sync.h"
#include "probe.h"

namespace drope::probes {

constexpr int kMaxSteps = 4;                 // k16 steps of one probe
constexpr int kImageBytes = 64 * 1024;       // room for each operand's image
constexpr int kSmemBytes = 2 * kImageBytes;  // A's image, then B's

using ptx::BFloat16;
using ptx::Float16;
using ptx::Major;

// How an operand image is described: what goes into its descriptor, and where each k step starts.
struct OperandCase {
  int32_t swizzle, leading_bytes, stride_bytes, image_bytes;
  int32_t step_offset[kMaxSteps];
};

struct WgmmaCase {
  int32_t is_float16, n, a_in_registers, a_mn_major, b_mn_major;
  int32_t num_steps;
  int32_t scale_d_first;  // scale_d of step 0; later steps accumulate
  int32_t initial;        // value of every accumulator before
  int32_t with_proxy_fence;
  OperandCase a, b;
};

// The instructions under test. Step: (d, A fragment, A descriptor, B descriptor, scale_d).
template <typename Element, int kN, Major kMajorA, Major kMajorB>
struct SharedA {
  static constexpr int kNumRegisters = kN / 2;
  __device__ static void issue(float (&d)[kN / 2], const uint32_t (&)[4], uint64_t desc_a,
                               uint64_t desc_b, int scale_d) {
    ptx::wgmma_mma_async_ss<kMajorA, kMajorB>(Element{}, d, desc_a, desc_b, scale_d);
  }
};

template <typename Element, int kN, Major kMajorB>
struct RegisterA {
  static constexpr int kNumRegisters = kN / 2;
  __device__ static void issue(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t,
                               uint64_t desc_b, int scale_d) {
    ptx::wgmma_mma_async_rs<kMajorB>(Element{}, d, a, desc_b, scale_d);
  }
};

__device__ inline void copy_image(unsigned char* smem, const unsigned char* image, int bytes) {
  for (int i = threadIdx.x * 4; i < bytes; i += 128 * 4) {
    *reinterpret_cast<uint32_t*>(smem + i) = *reinterpret_cast<const uint32_t*>(image + i);
  }
}

// a: image of A in shared memory, or its fragments (steps, 128, 4) when A is in registers;
// b: image of B; out: (128, n/2) accumulators as the threads hold them.
template <typename Instruction>
__global__ void __launch_bounds__(128, 1)
    wgmma_kernel(const unsigned char* a, const unsigned char* b, float* out,
                 const __grid_constant__ WgmmaCase test) {
  extern __shared__ __align__(1024) unsigned char smem[];
  unsigned char* a_smem = smem;
  unsigned char* b_smem = smem + kImageBytes;
  if (!test.a_in_registers) copy_image(a_smem, a, test.a.image_bytes);
  copy_image(b_smem, b, test.b.image_bytes);
  if (test.with_proxy_fence) ptx::fence_proxy_async_shared();
  __syncthreads();

  const uint32_t* fragments = reinterpret_cast<const uint32_t*>(a);
  uint32_t a_frag[4] = {};
  float d[Instruction::kNumRegisters];
#pragma unroll
  for (int i = 0; i < Instruction::kNumRegisters; ++i) d[i] = static_cast<float>(test.initial);
  // One complete group a step, so that the number of steps may vary at run time; batches of several
  // wgmma are gemm_sm90.cu's part.
#pragma unroll 1
  for (int step = 0; step < test.num_steps; ++step) {
    if (test.a_in_registers) {
      for (int i = 0; i < 4; ++i) a_frag[i] = fragments[(step * 128 + threadIdx.x) * 4 + i];
    }
    const uint64_t desc_a =
        ptx::matrix_descriptor(static_cast<ptx::MatrixSwizzle>(test.a.swizzle),
                               ptx::smem_address(a_smem) + test.a.step_offset[step],
                               test.a.leading_bytes, test.a.stride_bytes);
    const uint64_t desc_b =
        ptx::matrix_descriptor(static_cast<ptx::MatrixSwizzle>(test.b.swizzle),
                               ptx::smem_address(b_smem) + test.b.step_offset[step],
                               test.b.leading_bytes, test.b.stride_bytes);
#pragma unroll
    for (int i = 0; i < Instruction::kNumRegisters; ++i) ptx::wgmma_fence_register(d[i]);
    ptx::wgmma_fence();
    Instruction::issue(d, a_frag, desc_a, desc_b, step > 0 || test.scale_d_first);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int i = 0; i < Instruction::kNumRegisters; ++i) ptx::wgmma_fence_register(d[i]);
  }
#pragma unroll
  for (int i = 0; i < Instruction::kNumRegisters; ++i) {
    out[threadIdx.x * Instruction::kNumRegisters + i] = d[i];
  }
}

// One row of the table of compiled instructions.
struct Entry {
  int32_t is_float16, n, a_in_registers, a_mn_major, b_mn_major;
  void (*kernel)(const unsigned char*, const unsigned char*, float*, WgmmaCase);

  bool serves(const WgmmaCase& test) const {
    return is_float16 == test.is_float16 && n == test.n && a_in_registers == test.a_in_registers &&
           a_mn_major == test.a_mn_major && b_mn_major == test.b_mn_major;
  }
};

template <typename Element>
constexpr int32_t kIsFloat16 = 0;
template <>
constexpr int32_t kIsFloat16<Float16> = 1;

template <typename Element, int kN, Major kMajorA, Major kMajorB>
constexpr Entry shared_a() {
  return {kIsFloat16<Element>,
          kN,
          0,
          static_cast<int>(kMajorA),
          static_cast<int>(kMajorB),
          wgmma_kernel<SharedA<Element, kN, kMajorA, kMajorB>>};
}

template <typename Element, int kN, Major kMajorB>
constexpr Entry register_a() {
  return {kIsFloat16<Element>,
          kN,
          1,
          0,
          static_cast<int>(kMajorB),
          wgmma_kernel<RegisterA<Element, kN, kMajorB>>};
}

const Entry kEntries[] = {
    shared_a<BFloat16, 64, Major::kK, Major::kK>(),
    shared_a<BFloat16, 64, Major::kK, Major::kMN>(),
    shared_a<BFloat16, 64, Major::kMN, Major::kK>(),
    shared_a<BFloat16, 64, Major::kMN, Major::kMN>(),
    shared_a<BFloat16, 128, Major::kK, Major::kK>(),
    shared_a<BFloat16, 128, Major::kMN, Major::kMN>(),
    shared_a<BFloat16, 96, Major::kK, Major::kMN>(),
    shared_a<BFloat16, 80, Major::kK, Major::kK>(),
    shared_a<BFloat16, 176, Major::kK, Major::kK>(),
    shared_a<BFloat16, 192, Major::kK, Major::kMN>(),
    shared_a<BFloat16, 256, Major::kK, Major::kK>(),
    shared_a<Float16, 64, Major::kK, Major::kK>(),
    shared_a<Float16, 128, Major::kK, Major::kMN>(),
    register_a<BFloat16, 64, Major::kK>(),
    register_a<BFloat16, 64, Major::kMN>(),
    register_a<BFloat16, 96, Major::kMN>(),
    register_a<BFloat16, 128, Major::kK>(),
    register_a<BFloat16, 128, Major::kMN>(),
    register_a<BFloat16, 192, Major::kK>(),
    register_a<BFloat16, 256, Major::kMN>(),
    register_a<Float16, 64, Major::kMN>(),
};

}  // namespace drope::probes

using namespace drope::probes;

// params: a WgmmaCase
extern "C" int probe_wgmma(const ProbeArguments* arguments) {
  const WgmmaCase& test = *reinterpret_cast<const WgmmaCase*>(arguments->params);
  for (const Entry& entry : kEntries) {
    if (!entry.serves(test)) continue;
    return run_probe(*arguments, [&](const DeviceArguments& device) {
      return launch_kernel(entry.kernel, dim3(1), 128, kSmemBytes,
                           device.a.as<const unsigned char>(), device.b.as<const unsigned char>(),
                           device.out.as<float>(), test);
    });
  }
  return cudaErrorInvalidDeviceFunction;  // no such instruction was compiled
}
