// PTX ISA, "Asynchronous warpgroup-level matrix instructions: Matrix descriptor" (sm_90a).
// Byte offset of element (mn, k), k < 16, 16-bit elements, from the start address, before the
// swizzle; S = swizzle span in bytes, E = S / 2:
//   K-major, swizzled    (mn/8)*SBO + (mn%8)*S + 2k                          SBO = 8S, LBO unused
//   K-major, none        (mn/8)*SBO + (mn%8)*16 + (k/8)*LBO + 2(k%8)
//   MN-major, swizzled   (mn/E)*LBO + 2(mn%E) + (k%8)*S + (k/8)*SBO
//   MN-major, none       (mn/8)*SBO + 2(mn%8) + (k%8)*16 + (k/8)*LBO
// then address ^= ((address >> 7) & (S/16 - 1)) << 4 on the absolute shared address.
#pragma once

#include <cstdint>

namespace drope::ptx {

// Bits 62-63. A tensor map counts the other way: none 0, 32 bytes 1, 64 bytes 2, 128 bytes 3.
enum class MatrixSwizzle : uint32_t { kNone = 0, k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };

// The order of an operand in shared memory: consecutive along k, or along m (A) or n (B).
enum class Major : int { kK = 0, kMN = 1 };

// smem: shared address; the tile is aligned to 8 swizzle spans, so the base offset is 0.
// leading_bytes (LBO) and stride_bytes (SBO): multiples of 16.
__device__ __forceinline__ uint64_t matrix_descriptor(MatrixSwizzle swizzle, uint32_t smem,
                                                      uint32_t leading_bytes,
                                                      uint32_t stride_bytes) {
  return static_cast<uint64_t>((smem & 0x3ffff) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffff) >> 4) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

}  // namespace drope::ptx
