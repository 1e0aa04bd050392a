// End to end on sm_90a: C (M, N) = A (M, K) . B (N, K)^T. One producer warpgroup (TMA, mbarrier
// ring, few registers) and two consumer warpgroups (wgmma, many registers). Also setmaxnreg alone.
#include "cuda/ptx/address.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/matrix_descriptor.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/tensor_copy.h"
#include "cuda/ptx/wgmma_bf16.h"
#include "cuda/ptx/wgmma_sync.h"
#include "probe.h"
#include "tensor_map.h"
#include "wait.h"

namespace drope::probes {

constexpr int kTileM = 128, kTileN = 128, kTileK = 64, kStages = 4;
constexpr int kABytes = kTileM * kTileK * 2, kBBytes = kTileN * kTileK * 2;
constexpr int kNumConsumers = 2;  // warpgroups of 64 rows each
constexpr int kSmemBytes = kStages * (kABytes + kBBytes) + 1024;

// Shared memory, swizzled tiles first so that each is aligned to 1024 bytes.
struct Ring {
  unsigned char a[kStages][kABytes];
  unsigned char b[kStages][kBBytes];
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Ring) <= kSmemBytes);

__device__ inline void produce(Ring& ring, const CUtensorMap* a_map, const CUtensorMap* b_map,
                               int num_tiles) {
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2;
    wait_or_give_up(&ring.empty[stage], parity ^ 1);  // passes at once in the first round
    ptx::mbarrier_arrive_expect_tx(&ring.full[stage], kABytes + kBBytes);
    ptx::cp_async_bulk_tensor_2d_load(ptx::smem_address(ring.a[stage]), a_map, &ring.full[stage],
                                      tile * kTileK, blockIdx.y * kTileM);
    ptx::cp_async_bulk_tensor_2d_load(ptx::smem_address(ring.b[stage]), b_map, &ring.full[stage],
                                      tile * kTileK, blockIdx.x * kTileN);
  }
}

__device__ inline void consume(Ring& ring, float (&acc)[kTileN / 2], int consumer, int num_tiles) {
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2;
    const uint32_t a_tile = ptx::smem_address(ring.a[stage]) + consumer * 64 * kTileK * 2;
    const uint32_t b_tile = ptx::smem_address(ring.b[stage]);
    wait_or_give_up(&ring.full[stage], parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      ptx::wgmma_mma_async_ss<ptx::Major::kK, ptx::Major::kK>(
          ptx::BFloat16{}, acc,
          ptx::matrix_descriptor(ptx::MatrixSwizzle::k128Bytes, a_tile + 32 * step, 0, 1024),
          ptx::matrix_descriptor(ptx::MatrixSwizzle::k128Bytes, b_tile + 32 * step, 0, 1024),
          tile > 0 || step > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(&ring.empty[stage]);
  }
}

__global__ void __launch_bounds__(128 * (1 + kNumConsumers), 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap a_map,
                     const __grid_constant__ CUtensorMap b_map, float* c, int m, int n, int k) {
  extern __shared__ __align__(1024) unsigned char smem[];
  Ring& ring = *reinterpret_cast<Ring*>(smem);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(&ring.full[stage], 1);
      ptx::mbarrier_init(&ring.empty[stage], kNumConsumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int num_tiles = (k + kTileK - 1) / kTileK;
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) produce(ring, &a_map, &b_map, num_tiles);
  } else {
    ptx::setmaxnreg_inc<232>();
    const int consumer = threadIdx.x / 128 - 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    float acc[kTileN / 2] = {};
    consume(ring, acc, consumer, num_tiles);
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) ptx::wgmma_fence_register(acc[i]);
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) {
      const int row = blockIdx.y * kTileM + consumer * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8;
      const int column = blockIdx.x * kTileN + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[static_cast<int64_t>(row) * n + column] = acc[i];
    }
  }
}

constexpr int kLive = 200;  // more than the 168 registers that 384 threads get at launch

// Each consumer thread holds kLive values across a barrier and writes them in reverse order; the
// producer's values pass through few registers. source, out: (2, kLive, 128) float32
__global__ void __launch_bounds__(384, 1) setmaxnreg_kernel(const float* source, float* out) {
  const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<24>();
    __syncthreads();
  } else {
    ptx::setmaxnreg_inc<240>();
    const int first = (warpgroup - 1) * kLive * 128 + thread;
    float live[kLive];
#pragma unroll
    for (int i = 0; i < kLive; ++i) live[i] = source[first + i * 128];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLive; ++i) out[first + i * 128] = live[kLive - 1 - i];
  }
}

}  // namespace drope::probes

using namespace drope::probes;

// params: m, n, k
extern "C" int probe_gemm_sm90(const ProbeArguments* arguments) {
  const int m = arguments->params[0], n = arguments->params[1], k = arguments->params[2];
  const dim3 grid((n + kTileN - 1) / kTileN, (m + kTileM - 1) / kTileM);
  const int32_t a_dims[] = {k, m}, b_dims[] = {k, n};
  const int32_t a_box[] = {kTileK, kTileM}, b_box[] = {kTileK, kTileN};
  constexpr auto kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  constexpr int kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    CUtensorMap a_map, b_map;
    cudaError_t status =
        encode_tensor_map(&a_map, device.a.as<void>(), {kType, 2, 2, a_dims, a_box, kSwizzle});
    if (status != cudaSuccess) return status;
    status = encode_tensor_map(&b_map, device.b.as<void>(), {kType, 2, 2, b_dims, b_box, kSwizzle});
    if (status != cudaSuccess) return status;
    return launch_kernel(gemm_sm90_kernel, grid, 128 * (1 + kNumConsumers), kSmemBytes, a_map,
                         b_map, device.out.as<float>(), m, n, k);
  });
}

extern "C" int probe_setmaxnreg(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(setmaxnreg_kernel, dim3(1), 384, 0, device.a.as<float>(),
                         device.out.as<float>());
  });
}
