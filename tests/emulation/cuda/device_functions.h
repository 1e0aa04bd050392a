// The runtime as kernels see it: nothing that is slow to compile.
#pragma once

#include <cstdint>

#include "dim3.h"

namespace drope::emulation {

// By value: the kernel has no business in the machine's memory.
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* dynamic_shared_memory();
uint32_t shared_window_address(const void* pointer);
void sync_threads();
void sync_warp(unsigned mask);
uint32_t shuffle_from(unsigned mask, uint32_t bits, int lane);
uint32_t ballot_of(unsigned mask, bool predicate);
// Before an atomic operation: fails unless these bytes are device memory.
void begin_atomic(const void* global, int64_t bytes);
[[noreturn]] void trap();

}  // namespace drope::emulation
