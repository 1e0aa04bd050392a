// The runtime as kernels see it: nothing that is slow to compile.
#pragma once

#include <cstdint>

#include "dim3.h"

namespace drope::emulation {

const Coordinates& coordinates();
unsigned char* dynamic_shared_memory();
uint32_t shared_window_address(const void* pointer);
void sync_threads();
void sync_warp(unsigned mask);
uint32_t shuffle_from(unsigned mask, uint32_t bits, int lane);
uint32_t ballot_of(unsigned mask, bool predicate);

}  // namespace drope::emulation
