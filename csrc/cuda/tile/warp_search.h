// A warp looks through a list of numbers, one a lane.
#pragma once

#include <cstdint>

#include "cuda/tile/accumulator.h"

namespace drope::tile {

inline constexpr int kWarpSize = 32;

// The sum of x over this lane and the lanes below it.
__device__ __forceinline__ int inclusive_sum(int x) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, x, distance);
    if (lane_index() >= distance) x += below;
  }
  return x;
}

// x of another lane, the same one for all.
__device__ __forceinline__ int from_lane(int x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

// Another lane's pointer; each lane names its own.
template <class Element>
__device__ __forceinline__ const Element* from_lane(const Element* pointer, int lane) {
  const auto address = reinterpret_cast<uint64_t>(pointer);
  const uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(address), lane);
  const uint32_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(address >> 32), lane);
  return reinterpret_cast<const Element*>(static_cast<uint64_t>(high) << 32 | low);
}

// Bit l is the predicate of lane l.
__device__ __forceinline__ unsigned lanes_where(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

__device__ __forceinline__ bool all_lanes(bool predicate) {
  return __all_sync(0xffffffffu, predicate) != 0;
}

// The first lane whose predicate holds; kWarpSize when none does.
__device__ __forceinline__ int first_lane(bool predicate) {
  const unsigned lanes = lanes_where(predicate);
  return lanes == 0 ? kWarpSize : __ffs(static_cast<int>(lanes)) - 1;
}

}  // namespace drope::tile
