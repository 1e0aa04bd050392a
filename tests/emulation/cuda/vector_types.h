// CUDA's built-in vectors, as far as emulated sources use them.
#pragma once

#include <cstdint>

#define DROPE_VECTOR_2(type, name)        \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }

#define DROPE_VECTOR_4(type, name)        \
  struct alignas(4 * sizeof(type)) name { \
    type x, y, z, w;                      \
  };                                      \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

DROPE_VECTOR_2(float, float2)
DROPE_VECTOR_2(int, int2)
DROPE_VECTOR_2(unsigned, uint2)
DROPE_VECTOR_4(float, float4)
DROPE_VECTOR_4(int, int4)
DROPE_VECTOR_4(unsigned, uint4)

#undef DROPE_VECTOR_2
#undef DROPE_VECTOR_4
