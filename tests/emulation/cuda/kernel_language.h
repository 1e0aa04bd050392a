// What nvcc knows without being told. Included before every emulated source.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../ptx/asm_statement.h"
#include "../runtime/launch.h"
#include "device_functions.h"
#include "dim3.h"
#include "vector_types.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__
#define __builtin_assume(condition) ((void)0)

using std::max;
using std::min;

#define threadIdx (::drope::emulation::thread_index())
#define blockIdx (::drope::emulation::block_index())
#define blockDim (::drope::emulation::block_size())
#define gridDim (::drope::emulation::grid_size())

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

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane + lanes < 32 ? lane + lanes : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane >= lanes ? lane - lanes : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return drope::emulation::ballot_of(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline size_t __cvta_generic_to_shared(const void* pointer) {
  return drope::emulation::shared_window_address(pointer);
}

// Blocks run one after the other, so that global memory has one order.
inline void __threadfence() {}
inline void __trap() { drope::emulation::trap(); }

template <typename T>
T atomicAdd(T* global, T value) {
  drope::emulation::begin_atomic(global, sizeof(T));
  const T old = *global;
  *global = old + value;
  return old;
}

template <typename T>
T __ldg(const T* global) {
  return *global;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t{a} * b) >> 32; }

// Approximations on the device: exact here.
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }

inline int32_t __float_as_int(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float __int_as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
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
