// Tiles that the layout tests choose from by number; tests/backends/cuda/test_tile.py has the same
// list.
#pragma once

#include "../../../probes/kernels/probe.h"
#include "cuda/tile/smem_tile.h"

namespace drope::probes {

template <class Tile>
struct Shape {
  using Type = Tile;
};

// launch(Shape<Tile>) of tile number `index`.
template <class Launch>
cudaError_t with_tile(int index, const Launch& launch) {
  switch (index) {
    case 0:
      return launch(Shape<tile::SmemTile<64, 32>>{});
    case 1:
      return launch(Shape<tile::SmemTile<64, 64>>{});
    case 2:
      return launch(Shape<tile::SmemTile<64, 96>>{});
    case 3:
      return launch(Shape<tile::SmemTile<16, 128>>{});
    case 4:
      return launch(Shape<tile::SmemTile<32, 256>>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Between device memory and all bytes of a tile, element by element as they lie.
template <class Tile>
__device__ void load_image(Tile& tile, const uint16_t* image) {
  auto* const elements = reinterpret_cast<uint16_t*>(tile.bytes);
  for (int i = threadIdx.x; i < Tile::kBytes / 2; i += blockDim.x) elements[i] = image[i];
  __syncthreads();
}

template <class Tile>
__device__ void save_image(uint16_t* image, const Tile& tile) {
  const auto* const elements = reinterpret_cast<const uint16_t*>(tile.bytes);
  __syncthreads();
  for (int i = threadIdx.x; i < Tile::kBytes / 2; i += blockDim.x) image[i] = elements[i];
}

template <class Tile>
__device__ void fill(Tile& tile, uint16_t bits) {
  auto* const elements = reinterpret_cast<uint16_t*>(tile.bytes);
  for (int i = threadIdx.x; i < Tile::kBytes / 2; i += blockDim.x) elements[i] = bits;
  __syncthreads();
}

}  // namespace drope::probes
