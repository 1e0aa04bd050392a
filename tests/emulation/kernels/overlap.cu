// Two products in flight, as attention overlaps the scores of one block with the output of another:
// the first is used while the second still runs.
#include "../../probes/kernels/probe.h"
#include "../../probes/kernels/wait.h"
#include "cuda/ptx/address.h"
#include "cuda/ptx/bulk_copy.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/matrix_descriptor.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/wgmma_bf16.h"
#include "cuda/ptx/wgmma_sync.h"

namespace drope::probes {

// What is done to the second product's accumulators before it has been waited for.
enum Meddling : int { kNothing = 0, kReadsEarly = 1, kWritesEarly = 2, kScalesEarly = 3 };

constexpr int kTileBytes = 64 * 16 * 2;  // bf16, K-major, no swizzle

__device__ inline uint64_t tile_descriptor(const unsigned char* tile) {
  return ptx::matrix_descriptor(ptx::MatrixSwizzle::kNone, ptx::smem_address(tile), 128, 256);
}

// tiles: A then B (64, 16) as they lie in shared memory; out: (2, 128, 32), A.B^T and 1 + A.B^T
__global__ void __launch_bounds__(128)
    overlap_kernel(const unsigned char* tiles, float* out, int meddling) {
  extern __shared__ __align__(1024) unsigned char smem[];
  uint64_t* full = reinterpret_cast<uint64_t*>(smem + 2 * kTileBytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, 2 * kTileBytes);
    ptx::cp_async_bulk_load(ptx::smem_address(smem), tiles, 2 * kTileBytes, full);
  }
  __syncthreads();
  wait_or_give_up(full, 0);
  const uint64_t desc_a = tile_descriptor(smem), desc_b = tile_descriptor(smem + kTileBytes);
  float first[32], second[32];
  for (int i = 0; i < 32; ++i) first[i] = 7, second[i] = 1;
  ptx::wgmma_fence();
  ptx::wgmma_mma_async_ss<ptx::Major::kK, ptx::Major::kK>(ptx::BFloat16{}, first, desc_a, desc_b,
                                                          0);
  ptx::wgmma_commit_group();
  ptx::wgmma_mma_async_ss<ptx::Major::kK, ptx::Major::kK>(ptx::BFloat16{}, second, desc_a, desc_b,
                                                          1);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<1>();
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = first[i];
  float* second_out = out + 128 * 32 + threadIdx.x * 32;
  for (int i = 0; i < 32; ++i) {
    if (meddling == kReadsEarly) second_out[i] = second[i];
    if (meddling == kWritesEarly) second[i] = 1;
    if (meddling == kScalesEarly) second[i] *= 2;
  }
  ptx::wgmma_wait_group<0>();
  if (meddling == kReadsEarly) return;
  for (int i = 0; i < 32; ++i) second_out[i] = second[i];
}

}  // namespace drope::probes

using namespace drope::probes;

// params: meddling
extern "C" int emulation_overlap(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(overlap_kernel, dim3(1), 128, 2 * kTileBytes + 8,
                         device.a.as<unsigned char>(), device.out.as<float>(),
                         arguments->params[0]);
  });
}
