// PTX ISA, "Data Movement and Conversion Instructions: Tensor copy" (sm_90): TMA in tile mode.
// Coordinates are elements, innermost first. A box is dense in shared memory, innermost fastest,
// then swizzled as its map says. Loads fill what lies outside the tensor with zeros and complete
// the bytes of the FULL box; stores and reductions skip it. Shared addresses are 128-byte aligned
// (1024 for the 128-byte swizzle); maps are 64-byte aligned.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/address.h"

namespace drope::ptx {

// prefetch.tensormap
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor.2d, global to shared
__device__ __forceinline__ void cp_async_bulk_tensor_2d_load(uint32_t smem, const CUtensorMap* map,
                                                             uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(smem),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

// cp.async.bulk.tensor.3d, global to shared
__device__ __forceinline__ void cp_async_bulk_tensor_3d_load(uint32_t smem, const CUtensorMap* map,
                                                             uint64_t* barrier, int c0, int c1,
                                                             int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// cp.async.bulk.tensor.4d, global to shared
__device__ __forceinline__ void cp_async_bulk_tensor_4d_load(uint32_t smem, const CUtensorMap* map,
                                                             uint64_t* barrier, int c0, int c1,
                                                             int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem),
      "l"(map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// cp.async.bulk.tensor.2d, shared to global
__device__ __forceinline__ void cp_async_bulk_tensor_2d_store(const CUtensorMap* map, uint32_t smem,
                                                              int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(smem), "r"(c0), "r"(c1)
      : "memory");
}

// cp.async.bulk.tensor.3d, shared to global
__device__ __forceinline__ void cp_async_bulk_tensor_3d_store(const CUtensorMap* map, uint32_t smem,
                                                              int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(smem), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// cp.async.bulk.tensor.4d, shared to global
__device__ __forceinline__ void cp_async_bulk_tensor_4d_store(const CUtensorMap* map, uint32_t smem,
                                                              int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// cp.reduce.async.bulk.tensor.2d, global += shared in the map's type
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_2d_add(const CUtensorMap* map,
                                                                   uint32_t smem, int c0, int c1) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group "
      "[%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(smem), "r"(c0), "r"(c1)
      : "memory");
}

// cp.reduce.async.bulk.tensor.3d, global += shared in the map's type
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_3d_add(const CUtensorMap* map,
                                                                   uint32_t smem, int c0, int c1,
                                                                   int c2) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group "
      "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(smem), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// cp.reduce.async.bulk.tensor.4d, global += shared in the map's type
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_4d_add(const CUtensorMap* map,
                                                                   uint32_t smem, int c0, int c1,
                                                                   int c2, int c3) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

}  // namespace drope::ptx
