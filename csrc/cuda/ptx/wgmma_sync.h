// PTX ISA, "Asynchronous warpgroup-level matrix instructions: wgmma.fence, commit_group,
// wait_group" (sm_90a).
#pragma once

namespace drope::ptx {

// Before the first wgmma, and after any ordinary access to its accumulators or A registers.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Returns when at most kPending of the newest groups are incomplete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: keeps the compiler from moving a use of this register across the asm around it.
__device__ __forceinline__ void wgmma_fence_register(float& accumulator) {
  asm volatile("" : "+f"(accumulator)::"memory");
}

}  // namespace drope::ptx
