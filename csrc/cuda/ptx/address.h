// Shared-window addresses: what the instructions below take in place of a pointer.
#pragma once

#include <cstdint>

namespace drope::ptx {

// PTX ISA, "Generic Addressing": a pointer into shared memory as its 32-bit window address.
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace drope::ptx
