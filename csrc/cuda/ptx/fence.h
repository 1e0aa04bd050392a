// PTX ISA, "membar, fence" (sm_90): orders ordinary accesses with those of TMA and wgmma.
#pragma once

namespace drope::ptx {

// After mbarrier.init, by the initialising thread, before the block barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Every thread that wrote shared memory, before the barrier that hands it to wgmma or a bulk copy.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Ordinary global writes that a bulk copy of the same kernel reads.
__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace drope::ptx
