// One-instruction arithmetic and conversion (sm_80).
#pragma once

#include <cstdint>

#include "cuda/ptx/element.h"

namespace drope::ptx {

// PTX ISA, "ex2": 2^x, absolute error 2^-22 relative to the result's binade; subnormals are 0.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// PTX ISA, "cvt": the FIRST source goes to the upper half, hence the order of the operands.
__device__ __forceinline__ uint32_t cvt_rn_x2(BFloat16, float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t cvt_rn_x2(Float16, float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// PTX ISA, "cvt": exact. (A bfloat16 is the upper half of its float32: no instruction.)
__device__ __forceinline__ float cvt_f32_f16(uint16_t half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}

}  // namespace drope::ptx
