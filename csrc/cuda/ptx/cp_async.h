// PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy", non-bulk (sm_80).
#pragma once

#include <cstdint>

namespace drope::ptx {

// cp.async: 16 bytes, global to shared. Reads source_bytes (0..16), fills the rest with zeros.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* global, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global),
               "r"(source_bytes)
               : "memory");
}

// cp.async.commit_group
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group: returns when at most kPending of the newest groups are incomplete.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace drope::ptx
