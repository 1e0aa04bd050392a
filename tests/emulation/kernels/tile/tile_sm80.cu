// What the functions of csrc/cuda/tile for sm_80 read and write, as bytes and registers.
#include "cuda/tile/copy_rows.h"
#include "cuda/tile/float_tile.h"
#include "cuda/tile/store_accumulator.h"
#include "cuda/tile/warp_mma_transposed.h"
#include "shapes.h"

namespace drope::probes {

constexpr uint16_t kUntouched = 0xeeee;
enum Access : int { kElement = 0, kPair = 1, kChunk = 2 };

// Numbers every element row * kCols + col. out: the tile's bytes
template <class Tile>
__global__ void place_kernel(uint16_t* out, int access) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& tile = *reinterpret_cast<Tile*>(smem);
  for (int row = threadIdx.x; row < Tile::kRows; row += blockDim.x) {
    const uint32_t first = row * Tile::kCols;
    for (uint32_t col = 0; access == kElement && col < Tile::kCols; ++col) {
      tile.element_at(row, col) = static_cast<uint16_t>(first + col);
    }
    for (uint32_t col = 0; access == kPair && col < Tile::kCols; col += 2) {
      tile.pair_at(row, col) = (first + col) | (first + col + 1) << 16;
    }
    for (int chunk = 0; access == kChunk && chunk < Tile::kNumChunks; ++chunk) {
      const uint32_t i = first + 8 * chunk;
      tile.chunk_at(row, chunk) = make_uint4(i | (i + 1) << 16, (i + 2) | (i + 3) << 16,
                                             (i + 4) | (i + 5) << 16, (i + 6) | (i + 7) << 16);
    }
  }
  save_image(out, tile);
}

// matrix: rows of kCols elements, of which [begin, end) are valid. out: the tile's bytes
template <class Tile>
__global__ void copy_kernel(const uint16_t* matrix, uint16_t* out, bool as_window, int first_row,
                            int begin, int end, int num_channels) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& tile = *reinterpret_cast<Tile*>(smem);
  fill(tile, kUntouched);
  if (as_window) {
    const tile::RowWindow window{matrix, Tile::kCols, begin, end};
    tile::copy_rows_async<128>(tile, window, first_row, num_channels);
  } else {
    const auto row_of = [&](int row) {
      const int inside = min(max(first_row + row, begin), end - 1);
      return tile::SourceRow{matrix + inside * Tile::kCols, first_row + row == inside};
    };
    tile::copy_rows_async<128>(tile, row_of, num_channels);
  }
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  save_image(out, tile);
}

// image: the tile's bytes. out: (kRows, kCols), written where rows and channels are asked for
template <class Tile>
__global__ void store_kernel(const uint16_t* image, uint16_t* out, int num_rows, int num_channels) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& tile = *reinterpret_cast<Tile*>(smem);
  load_image(tile, image);
  tile::store_rows<128>(
      tile, [&](int row) { return out + row * Tile::kCols; }, num_rows, num_channels,
      static_cast<int>(threadIdx.x));
}

enum Loader : int { kA = 0, kATransposed = 1, kB = 2, kBTransposed = 3 };

// image: the tile's bytes. out: (32, 4) registers of the fragment at `row` and 16 columns `col16`
template <class Tile>
__global__ void fragment_kernel(const uint16_t* image, uint32_t* out, int loader, int row,
                                int col16) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& tile = *reinterpret_cast<Tile*>(smem);
  load_image(tile, image);
  uint32_t fragment[4] = {};
  if (loader == kA) tile::load_a(fragment, tile, row, col16);
  if (loader == kATransposed) tile::load_a_transposed(fragment, tile, row, col16);
  if (loader == kB) tile::load_b(fragment, tile, row, col16);
  if (loader == kBTransposed) tile::load_b_transposed(fragment, tile, row, col16);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = fragment[i];
}

// acc: (32, 16) an accumulator of 32 columns. out: (32, 44) int32: rows and columns of its slots,
// its A fragments of two steps, quad_max and quad_sum of its first two slots
__global__ void accumulator_kernel(const float* acc, int32_t* out) {
  const int lane = tile::lane_index();
  float mine[16];
  for (int i = 0; i < 16; ++i) mine[i] = acc[lane * 16 + i];
  int32_t* to = out + lane * 44;
  for (int i = 0; i < 16; ++i) {
    *to++ = tile::accumulator_row(i / 2 % 2);
    *to++ = tile::accumulator_col(i / 4, i % 2);
  }
  for (int step = 0; step < 2; ++step) {
    uint32_t a[4];
    tile::as_a_fragment(ptx::BFloat16{}, a, mine, step);
    for (const uint32_t pair : a) *to++ = static_cast<int32_t>(pair);
  }
  for (int i = 0; i < 2; ++i) {
    *to++ = static_cast<int32_t>(tile::quad_max(mine[i]));
    *to++ = static_cast<int32_t>(tile::quad_sum(mine[i]));
  }
}

// acc: (32, 32) an accumulator of 64 columns. out: the bytes of a (64, 64) tile of 16-bit elements,
// or the first 64 columns of (32, 96) floats
__global__ void store_accumulator_kernel(const float* acc, void* out, bool as_float, int row) {
  extern __shared__ __align__(1024) unsigned char smem[];
  float mine[32];
  for (int i = 0; i < 32; ++i) mine[i] = acc[tile::lane_index() * 32 + i];
  if (as_float) {
    using Tile = tile::FloatTile<32, 96>;
    auto& tile = *reinterpret_cast<Tile*>(smem);
    for (int i = threadIdx.x; i < 32 * Tile::kStride; i += 32) tile.values[i] = -1.0f;
    __syncthreads();
    tile::store_accumulator(tile, row, 32, mine, 2.0f);
    __syncthreads();
    auto* const to = static_cast<float*>(out);
    for (int i = threadIdx.x; i < 32 * 96; i += 32) to[i] = tile.row(i / 96)[i % 96];
  } else {
    auto& tile = *reinterpret_cast<tile::SmemTile<64, 64>*>(smem);
    fill(tile, kUntouched);
    tile::store_accumulator(ptx::BFloat16{}, tile, row, mine);
    save_image(static_cast<uint16_t*>(out), tile);
  }
}

using OperandA = tile::SmemTile<32, 64>;
using OperandB = tile::SmemTile<32, 96>;
enum Product : int { kABt = 0, kPV = 1, kPB = 2, kAtB = 3 };

template <class T, int kSize>
__device__ void save_product(float* out, const float (&acc)[2][kSize]) {
  for (int m = 0; m < 2; ++m) {
    for (int i = 0; i < kSize; ++i) {
      out[(m * 32 + tile::lane_index()) * kSize + i] = acc[m][i];
    }
  }
}

// One warp. a: OperandA's bytes; b: OperandB's bytes, then (2, 32, 16) float32 of P (32, 32).
// out: (2, 32, columns / 2) float32
template <class T>
__global__ void product_kernel(const uint16_t* a, const unsigned char* b, float* out, int product) {
  extern __shared__ __align__(1024) unsigned char smem[];
  auto& a_tile = *reinterpret_cast<OperandA*>(smem);
  auto& b_tile = *reinterpret_cast<OperandB*>(smem + OperandA::kBytes);
  load_image(a_tile, a);
  load_image(b_tile, reinterpret_cast<const uint16_t*>(b));
  const auto* const p = reinterpret_cast<const float*>(b + OperandB::kBytes);
  float acc_p[2][16];
  for (int m = 0; m < 2; ++m) {
    for (int i = 0; i < 16; ++i) acc_p[m][i] = p[(m * 32 + tile::lane_index()) * 16 + i];
  }
  if (product == kABt) {  // rows 0 .. of A, rows 16 .. of A: (32, 64) . (16, 64)^T
    float acc[2][8] = {};
    tile::multiply_a_bt<4>(T{}, acc, a_tile, 0, a_tile, 16);
    save_product<T>(out, acc);
  } else if (product == kPV) {  // (32, 32) . (32, 96)
    float acc[2][48] = {};
    tile::multiply_p_b(T{}, acc, acc_p, b_tile);
    save_product<T>(out, acc);
  } else if (product == kPB) {  // the first 16 columns of P . rows 16 .., columns 16 .. 79 of B
    float acc[2][32] = {}, acc_p16[2][8];
    for (int m = 0; m < 2; ++m) {
      for (int i = 0; i < 8; ++i) acc_p16[m][i] = acc_p[m][i];
    }
    tile::multiply_p_b(T{}, acc, acc_p16, b_tile, 16, 1);
    save_product<T>(out, acc);
  } else {  // columns 16 .. 47 of A, columns 32 .. 63 of B: (32, 32)^T . (32, 32)
    float acc[2][16] = {};
    tile::multiply_at_b<2>(T{}, acc, a_tile, 1, b_tile, 2);
    save_product<T>(out, acc);
  }
}

}  // namespace drope::probes

using namespace drope;
using namespace drope::probes;

// params: tile, access
extern "C" int layout_place(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return with_tile(arguments->params[0], [&](auto shape) {
      using Tile = typename decltype(shape)::Type;
      return launch_kernel(place_kernel<Tile>, dim3(1), 128, Tile::kBytes,
                           device.out.as<uint16_t>(), arguments->params[1]);
    });
  });
}

// params: tile, as_window, first_row, begin, end, num_channels
extern "C" int layout_copy(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    const int32_t* p = arguments->params;
    return with_tile(p[0], [&](auto shape) {
      using Tile = typename decltype(shape)::Type;
      return launch_kernel(copy_kernel<Tile>, dim3(1), 128, Tile::kBytes, device.a.as<uint16_t>(),
                           device.out.as<uint16_t>(), p[1] != 0, p[2], p[3], p[4], p[5]);
    });
  });
}

// params: tile, num_rows, num_channels
extern "C" int layout_store(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    const int32_t* p = arguments->params;
    return with_tile(p[0], [&](auto shape) {
      using Tile = typename decltype(shape)::Type;
      return launch_kernel(store_kernel<Tile>, dim3(1), 128, Tile::kBytes, device.a.as<uint16_t>(),
                           device.out.as<uint16_t>(), p[1], p[2]);
    });
  });
}

// params: tile, loader, row, col16
extern "C" int layout_fragment(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    const int32_t* p = arguments->params;
    return with_tile(p[0], [&](auto shape) {
      using Tile = typename decltype(shape)::Type;
      return launch_kernel(fragment_kernel<Tile>, dim3(1), 32, Tile::kBytes,
                           device.a.as<uint16_t>(), device.out.as<uint32_t>(), p[1], p[2], p[3]);
    });
  });
}

extern "C" int layout_accumulator(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(accumulator_kernel, dim3(1), 32, 0, device.a.as<float>(),
                         device.out.as<int32_t>());
  });
}

// params: as_float, row
extern "C" int layout_store_accumulator(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(store_accumulator_kernel, dim3(1), 32, 32 * 1024, device.a.as<float>(),
                         device.out.as<void>(), arguments->params[0] != 0, arguments->params[1]);
  });
}

// params: product, is_float16
extern "C" int layout_product(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    const auto kernel =
        arguments->params[1] ? product_kernel<ptx::Float16> : product_kernel<ptx::BFloat16>;
    return launch_kernel(kernel, dim3(1), 32, OperandA::kBytes + OperandB::kBytes,
                         device.a.as<uint16_t>(), device.b.as<unsigned char>(),
                         device.out.as<float>(), arguments->params[0]);
  });
}
