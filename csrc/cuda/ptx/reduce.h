// PTX ISA, "Parallel Synchronization and Communication Instructions: red": global memory += value,
// no result. The order of the additions is not fixed.
#pragma once

namespace drope::ptx {

// red.global.add.f32 (sm_80)
__device__ __forceinline__ void red_add_f32(float* global, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(global), "f"(value) : "memory");
}

// red.global.add.v2.f32 (sm_90): two consecutive floats, 8-byte aligned.
__device__ __forceinline__ void red_add_v2_f32(float* global, float x, float y) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(global), "f"(x), "f"(y) : "memory");
}

// red.global.add.v4.f32 (sm_90): four consecutive floats, 16-byte aligned.
__device__ __forceinline__ void red_add_v4_f32(float* global, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(x), "f"(y),
               "f"(z), "f"(w)
               : "memory");
}

}  // namespace drope::ptx
