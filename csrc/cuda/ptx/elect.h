// PTX ISA, "elect.sync" (sm_90): true in one lane of a full warp.
#pragma once

#include <cstdint>

namespace drope::ptx {

__device__ __forceinline__ bool elect_sync() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace drope::ptx
