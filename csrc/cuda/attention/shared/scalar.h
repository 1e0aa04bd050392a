// float as the number type of position.h, and the constants of base-2 softmax.
#pragma once

#include "position.h"

namespace drope::cuda {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// A float that carries the arithmetic position.h asks of a number type.
struct Scalar {
  float x;
  __device__ __forceinline__ friend Scalar operator+(Scalar a, Scalar b) {
    return {__fadd_rn(a.x, b.x)};
  }
  __device__ __forceinline__ friend Scalar operator-(Scalar a, Scalar b) {
    return {__fadd_rn(a.x, -b.x)};
  }
  __device__ __forceinline__ friend Scalar operator*(Scalar a, Scalar b) {
    return {__fmul_rn(a.x, b.x)};
  }
  __device__ __forceinline__ friend Scalar fused(Scalar a, Scalar b, Scalar c) {
    return {fmaf(a.x, b.x, c.x)};
  }
  __device__ __forceinline__ friend Scalar nearest(Scalar a) { return {rintf(a.x)}; }
  __device__ __forceinline__ friend Scalar absolute(Scalar a) { return {fabsf(a.x)}; }
  __device__ __forceinline__ friend Scalar splat(Scalar, float x) { return {x}; }
};

}  // namespace drope::cuda
