// PTX ISA, "Data Movement and Conversion Instructions: Bulk copy" (sm_90): one-dimensional copies.
// Addresses and sizes are multiples of 16 bytes. Groups belong to the issuing thread.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.h"

namespace drope::ptx {

// cp.async.bulk, global to shared; completes bytes on the barrier's transaction count.
__device__ __forceinline__ void cp_async_bulk_load(uint32_t smem, const void* global,
                                                   uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem),
      "l"(global), "r"(bytes), "r"(smem_address(barrier))
      : "memory");
}

// cp.async.bulk, shared to global
__device__ __forceinline__ void cp_async_bulk_store(void* global, uint32_t smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(smem), "r"(bytes)
               : "memory");
}

// cp.reduce.async.bulk: global float32 += shared. The order of additions is not fixed.
__device__ __forceinline__ void cp_reduce_async_bulk_add_f32(float* global, uint32_t smem,
                                                             uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(smem), "r"(bytes)
      : "memory");
}

// cp.async.bulk.commit_group: tensor stores and reductions as well.
__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// cp.async.bulk.wait_group: all but the newest kPending groups have written global memory.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// cp.async.bulk.wait_group.read: all but the newest kPending groups have read shared memory.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace drope::ptx
