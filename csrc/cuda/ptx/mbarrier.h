// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier" (sm_90 forms).
// A phase completes when no arrival is pending and its transaction count is 0; the arrival count
// then reloads and the parity flips. A fresh barrier is in phase 0: waiting for parity 1 passes.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.h"

namespace drope::ptx {

// mbarrier.init: barrier is 8-byte aligned in shared memory, count is 1..2^20-1.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count)
               : "memory");
}

// mbarrier.arrive, count 1
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// mbarrier.arrive.expect_tx: adds bytes to the transaction count, then arrives once.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)),
      "r"(bytes)
      : "memory");
}

// mbarrier.expect_tx: adds bytes to the transaction count and does not arrive.
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)),
      "r"(bytes)
      : "memory");
}

// mbarrier.try_wait.parity: true once the phase of that parity is complete; may time out first.
__device__ __forceinline__ bool mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}\n"
      : "=r"(complete)
      : "r"(smem_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

// mbarrier.test_wait.parity: as try_wait, never suspends.
__device__ __forceinline__ bool mbarrier_test_wait_parity(uint64_t* barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}\n"
      : "=r"(complete)
      : "r"(smem_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
}

}  // namespace drope::ptx
