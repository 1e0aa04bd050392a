// PTX ISA, "Asynchronous warpgroup-level matrix instructions". The threads of a warpgroup append to
// one queue; an operation is issued when all 128 have. Only wait_group suspends them.
#pragma once

#include <cstdint>

#include "warp.h"

namespace drope::emulation {

constexpr int kMaxAccumulators = 128;  // registers of a thread: n = 256

// m64nNk16. What every thread of the warpgroup must agree on.
struct WgmmaShape {
  int n = 0;
  ElementType type = ElementType::kBFloat16;
  bool a_in_registers = false, accumulates = false;
  bool a_is_mn_major = false, b_is_mn_major = false;
  int sign_a = 1, sign_b = 1;
  uint64_t desc_a = 0, desc_b = 0;

  bool operator==(const WgmmaShape& other) const;
};

void begin_wgmma();
void wgmma_fence();
void wgmma_mma(const WgmmaShape& shape, float* const* d, const uint32_t* a);
void wgmma_commit_group();
void wgmma_wait_group(int num_pending);
void set_max_registers(int num_registers);
// An ordinary access of a register: fails when a wgmma in flight has it as accumulator.
void check_register_access(const void* address, const char* access);
void end_wgmma();  // fails when products are left that nobody waited for

}  // namespace drope::emulation
