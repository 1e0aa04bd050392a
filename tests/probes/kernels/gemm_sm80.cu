// End to end on sm_80: C (M, N) = A (M, K) . B (N, K)^T with a cp.async ring, ldmatrix and mma.
#include "cuda/ptx/address.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"
#include "probe.h"

namespace drope::probes {

constexpr int kTileM = 64, kTileN = 64, kTileK = 64, kStages = 3;
constexpr int kOperandBytes = kTileM * kTileK * 2;  // A and B tiles are equally large
constexpr int kStageBytes = 2 * kOperandBytes;

// Byte offset of 16-byte chunk `chunk` of `row`; rows are 128 bytes, chunks XORed with the row so
// that eight consecutive rows of one chunk meet eight different bank groups.
__device__ inline int swizzled(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// One k tile of A and B into a stage. Rows beyond the matrix become zeros.
__device__ inline void load_stage(uint32_t stage, const uint16_t* a, const uint16_t* b, int m,
                                  int n, int k, int k_start) {
  for (int i = 0; i < kTileM * 8 / 128; ++i) {
    const int piece = threadIdx.x + i * 128, row = piece / 8, chunk = piece % 8;
    const int a_row = blockIdx.y * kTileM + row, b_row = blockIdx.x * kTileN + row;
    const int column = k_start + chunk * 8;
    // A row outside the matrix is not read; its address stays inside all the same.
    const uint16_t* a_from = a + static_cast<int64_t>(a_row < m ? a_row : 0) * k + column;
    const uint16_t* b_from = b + static_cast<int64_t>(b_row < n ? b_row : 0) * k + column;
    ptx::cp_async_16(stage + swizzled(row, chunk), a_from, a_row < m ? 16 : 0);
    ptx::cp_async_16(stage + kOperandBytes + swizzled(row, chunk), b_from, b_row < n ? 16 : 0);
  }
}

// The warp's (32, 32) part of one stage's product.
__device__ inline void multiply_stage(float (&acc)[2][4][4], uint32_t stage, int warp_m,
                                      int warp_n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kTileK / 16; ++step) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_m + 16 * i + lane % 16;
      ptx::ldmatrix_x4(a[i], stage + swizzled(row, 2 * step + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // two n8 tiles, both k halves
      const int row = warp_n + 16 * j + lane % 8 + 8 * (lane / 16);
      ptx::ldmatrix_x4(b[j], stage + kOperandBytes + swizzled(row, 2 * step + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        ptx::mma_m16n8k16(ptx::BFloat16{}, acc[i][j], a[i], b[j / 2][j % 2 * 2],
                          b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// 4 warps, 2 x 2. m and n are arbitrary, k is a multiple of kTileK.
__global__ void __launch_bounds__(128)
    gemm_sm80_kernel(const uint16_t* a, const uint16_t* b, float* c, int m, int n, int k) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const uint32_t stages = ptx::smem_address(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  float acc[2][4][4] = {};

  const int num_tiles = k / kTileK;
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < num_tiles) load_stage(stages + tile * kStageBytes, a, b, m, n, k, tile * kTileK);
    ptx::cp_async_commit_group();
  }
  for (int tile = 0; tile < num_tiles; ++tile) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the tile is visible to all, and all have left the stage loaded next
    const int next = tile + kStages - 1;
    if (next < num_tiles) {
      load_stage(stages + next % kStages * kStageBytes, a, b, m, n, k, next * kTileK);
    }
    ptx::cp_async_commit_group();  // also when empty: the wait counts groups
    multiply_stage(acc, stages + tile % kStages * kStageBytes, warp_m, warp_n);
  }

  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = blockIdx.y * kTileM + warp_m + 16 * i + lane / 4 + e / 2 * 8;
        const int column = blockIdx.x * kTileN + warp_n + 8 * j + lane % 4 * 2 + e % 2;
        if (row < m && column < n) c[static_cast<int64_t>(row) * n + column] = acc[i][j][e];
      }
    }
  }
}

}  // namespace drope::probes

using namespace drope::probes;

// params: m, n, k
extern "C" int probe_gemm_sm80(const ProbeArguments* arguments) {
  const int m = arguments->params[0], n = arguments->params[1], k = arguments->params[2];
  const dim3 grid((n + kTileN - 1) / kTileN, (m + kTileM - 1) / kTileM);
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(gemm_sm80_kernel, grid, 128, kStages * kStageBytes,
                         device.a.as<uint16_t>(), device.b.as<uint16_t>(), device.out.as<float>(),
                         m, n, k);
  });
}
