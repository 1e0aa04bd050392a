// One wgmma: its operands in shared memory and registers, its arithmetic.
#pragma once

#include <cstdint>

#include "machine.h"
#include "shared_memory.h"
#include "wgmma.h"

namespace drope::emulation {

struct WgmmaProduct {
  WgmmaShape shape;
  int num_joined = 0;  // threads that have appended it
  bool is_done = false;
  uint32_t epoch = 0;
  bool has_joined[kWarpgroupThreads];
  float* d[kWarpgroupThreads][kMaxAccumulators];
  AddressRange span[kWarpgroupThreads];  // of the addresses in d
  uint32_t a[kWarpgroupThreads][4];
  // What the accumulators held while they are poisoned.
  float saved[kWarpgroupThreads][kMaxAccumulators];
  bool is_poisoned[kWarpgroupThreads];

  int num_accumulators() const { return shape.n / 2; }
  void join(int thread, float* const* accumulators, const uint32_t* a_registers);
  void poison_accumulators(int thread);
  void restore_accumulators(int thread);
  // Reads the operands and writes the accumulators of all threads. Warp w reads rows 16w..16w+15 of
  // A and all of B by itself, and may only read what it has seen written.
  void execute(int agent, const Clock* warp_clocks);
};

}  // namespace drope::emulation
