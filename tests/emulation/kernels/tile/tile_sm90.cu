// What the functions of csrc/cuda/tile for sm_90a read and write, as bytes and registers.
#include <iostream>
#include <stdexcept>

#include "cuda/ptx/fence.h"
#include "cuda/tensor_map.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/tensor_box.h"
#include "cuda/tile/wgmma.h"
#include "shapes.h"

namespace drope::probes {

// A box of rows `row` .. of one head. out: the tile's bytes
template <class Tile>
__global__ void box_kernel(const __grid_constant__ cuda::HeadTensorMap map, uint16_t* out, int row,
                           int head, int batch) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& tile = *reinterpret_cast<Tile*>(smem);
  auto* const barrier = reinterpret_cast<uint64_t*>(smem + Tile::kBytes);
  fill(tile, 0xeeee);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, Tile::kBytes);
    tile::copy_box_async(tile, map, barrier, row, head, batch);
  }
  tile::wait_parity(barrier, 0);
  save_image(out, tile);
}

// out: (2 + 2 * 16) uint64: the descriptors of the first step, K-major and MN-major, then those of
// steps 0 .. 15 as far as the tile has them
template <class Tile>
__global__ void descriptor_kernel(uint64_t* out) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const auto& tile = *reinterpret_cast<const Tile*>(smem + 1024);
  if (threadIdx.x != 0) return;
  for (int step = 0; step < Tile::kCols / tile::kStepK; ++step) {
    out[step] = tile::advance(tile::descriptor_k_major(tile), tile::step_bytes_k_major<Tile>(step));
  }
  for (int step = 0; step < Tile::kRows / tile::kStepK; ++step) {
    out[16 + step] =
        tile::advance(tile::descriptor_mn_major(tile), tile::step_bytes_mn_major<Tile>(step));
  }
  out[32] = ptx::smem_address(smem);
}

using OperandA = tile::SmemTile<64, 128>;
using OperandB = tile::SmemTile<64, 128>;

// One warpgroup. a, b: the operands' bytes. scores: A . B^T (64, 64); product: its rounded values .
// B (64, 128); out: (128, 32) scores, (128, 64) product, float32
template <class T>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const uint16_t* a, const uint16_t* b, float* out) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& a_tile = *reinterpret_cast<OperandA*>(smem);
  auto& b_tile = *reinterpret_cast<OperandB*>(smem + OperandA::kBytes);
  load_image(a_tile, a);
  load_image(b_tile, b);
  ptx::fence_proxy_async_shared();
  __syncthreads();

  float acc_s[32] = {}, acc_o[64] = {};
  tile::multiply_a_bt_async(T{}, acc_s, a_tile, b_tile);
  tile::wait_products<0>(acc_s);
  uint32_t p_frag[4][4];
  tile::as_a_fragments(T{}, p_frag, acc_s);
  tile::multiply_a_b_async(T{}, acc_o, p_frag, b_tile);
  tile::wait_products<0>(acc_o);
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = acc_s[i];
  for (int i = 0; i < 64; ++i) out[128 * 32 + threadIdx.x * 64 + i] = acc_o[i];
}

// One warp. acc: (32, 64) an accumulator of 128 columns. out: the bytes of a (32, 128) tile
__global__ void store_fragments_kernel(const float* acc, uint16_t* out, int row) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& tile = *reinterpret_cast<tile::SmemTile<32, 128>*>(smem);
  fill(tile, 0xeeee);
  float mine[64];
  for (int i = 0; i < 64; ++i) mine[i] = acc[tile::lane_index() * 64 + i];
  tile::store_fragments(ptx::BFloat16{}, tile, row, mine);
  save_image(out, tile);
}

}  // namespace drope::probes

using namespace drope;
using namespace drope::probes;

// params: tile, batch, heads, rows, channels, strides of batch, head, row, then row, head and batch
// of the box
extern "C" int layout_box(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    const int32_t* p = arguments->params;
    return with_tile(p[0], [&](auto shape) {
      using Tile = typename decltype(shape)::Type;
      const cuda::HeadTensor tensor{
          "k", DType::kBFloat16, device.a.as<void>(), p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
      cuda::HeadTensorMap map;
      try {
        map = cuda::encode_tensor_map(tensor, Tile::kRows, Tile::kSlabCols);
      } catch (const std::runtime_error& refused) {
        std::cerr << refused.what() << "\n";
        return cudaErrorInvalidValue;
      }
      return launch_kernel(box_kernel<Tile>, dim3(1), 128, Tile::kBytes + 8, map,
                           device.out.as<uint16_t>(), p[8], p[9], p[10]);
    });
  });
}

// params: tile
extern "C" int layout_descriptor(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return with_tile(arguments->params[0], [&](auto shape) {
      using Tile = typename decltype(shape)::Type;
      return launch_kernel(descriptor_kernel<Tile>, dim3(1), 32, Tile::kBytes + 1024,
                           device.out.as<uint64_t>());
    });
  });
}

// params: is_float16
extern "C" int layout_wgmma(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    const auto kernel =
        arguments->params[0] ? wgmma_kernel<ptx::Float16> : wgmma_kernel<ptx::BFloat16>;
    return launch_kernel(kernel, dim3(1), 128, OperandA::kBytes + OperandB::kBytes,
                         device.a.as<uint16_t>(), device.b.as<uint16_t>(), device.out.as<float>());
  });
}

// params: row
extern "C" int layout_store_fragments(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(store_fragments_kernel, dim3(1), 32, 32 * 128 * 2, device.a.as<float>(),
                         device.out.as<uint16_t>(), arguments->params[0]);
  });
}
