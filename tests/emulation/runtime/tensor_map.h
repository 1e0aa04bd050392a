// cuTensorMapEncodeTiled: what a map may say, and what lies in one box.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "warp.h"

namespace drope::emulation {

constexpr int kMaxRank = 5;

// What the emulator keeps in a CUtensorMap. Dimension 0 is contiguous.
struct TensorMap {
  unsigned char* base;
  uint64_t stride[kMaxRank];  // bytes
  uint32_t dim[kMaxRank];
  uint16_t box[kMaxRank];
  uint8_t rank, element_bytes, swizzle, type;
  uint32_t magic;

  uint32_t box_bytes() const;
  // Where element `index` of the box lies in global memory; null when it is outside.
  unsigned char* global(const int* start, uint32_t index) const;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// Fails when the pointer leads to no encoded map.
const TensorMap& as_tensor_map(const void* map);

// PTX ISA, "Swizzling modes": swizzle counts as in CUtensorMapSwizzle.
inline uint32_t swizzled(uint32_t address, int swizzle) {
  return address ^ (((address >> 7) & ((1u << swizzle) - 1)) << 4);
}

}  // namespace drope::emulation
