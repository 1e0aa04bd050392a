// Between float32 and the 16-bit element types; T is ptx::BFloat16 or ptx::Float16.
#pragma once

#include <cstdint>

#include "cuda/ptx/math.h"

namespace drope::tile {

__device__ __forceinline__ float to_float(ptx::BFloat16, uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ float to_float(ptx::Float16, uint16_t bits) {
  return ptx::cvt_f32_f16(bits);
}

struct FloatPair {
  float low, high;
};

// Two elements of one register, the lower column in the low half.
template <class T>
__device__ __forceinline__ FloatPair unpack(T, uint32_t pair) {
  return {to_float(T{}, static_cast<uint16_t>(pair)),
          to_float(T{}, static_cast<uint16_t>(pair >> 16))};
}

template <class T>
__device__ __forceinline__ uint32_t pack(T, float low, float high) {
  return ptx::cvt_rn_x2(T{}, low, high);
}

template <class T>
__device__ __forceinline__ uint16_t from_float(T, float x) {
  return static_cast<uint16_t>(pack(T{}, x, 0.0f));
}

// The eight elements of a 16-byte chunk.
template <class T>
__device__ __forceinline__ void unpack_chunk(T, const uint4& chunk, float* x) {
  const uint32_t words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const FloatPair pair = unpack(T{}, words[i]);
    x[2 * i] = pair.low;
    x[2 * i + 1] = pair.high;
  }
}

template <class T>
__device__ __forceinline__ uint4 pack_chunk(T, const float* x) {
  return {pack(T{}, x[0], x[1]), pack(T{}, x[2], x[3]), pack(T{}, x[4], x[5]),
          pack(T{}, x[6], x[7])};
}

}  // namespace drope::tile
