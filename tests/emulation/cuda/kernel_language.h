// What nvcc knows without being told. Included before every emulated source.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../ptx/asm_statement.h"
#include "../runtime/launch.h"
#include "device_functions.h"
#include "dim3.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (::drope::emulation::coordinates().thread)
#define blockIdx (::drope::emulation::coordinates().block)
#define blockDim (::drope::emulation::coordinates().block_size)
#define gridDim (::drope::emulation::coordinates().grid_size)

inline void __syncthreads() { drope::emulation::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { drope::emulation::sync_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = drope::emulation::shuffle_from(mask, bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return drope::emulation::ballot_of(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline size_t __cvta_generic_to_shared(const void* pointer) {
  return drope::emulation::shared_window_address(pointer);
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
