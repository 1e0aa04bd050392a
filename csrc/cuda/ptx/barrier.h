// PTX ISA, "bar, barrier": the 16 named barriers of a block. Barrier 0 is __syncthreads.
// num_threads: all that sync or arrive, a multiple of 32, the same in every call of one phase.
#pragma once

namespace drope::ptx {

__device__ __forceinline__ void bar_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

__device__ __forceinline__ void bar_arrive(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

}  // namespace drope::ptx
