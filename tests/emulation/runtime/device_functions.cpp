#include "../cuda/device_functions.h"

#include "device_memory.h"
#include "machine.h"
#include "named_barrier.h"
#include "shared_memory.h"
#include "warp.h"

namespace drope::emulation {
namespace {

void require_all_lanes(unsigned mask) {
  const int size = warp_size(current_thread().warp);
  const unsigned all = size == kWarpThreads ? 0xffffffffu : (1u << size) - 1;
  if ((mask & all) != all) fail("warp operations on some lanes (mask 0x%x) are not emulated", mask);
}

}  // namespace

dim3 thread_index() { return current_thread().coordinates.thread; }
dim3 block_index() { return current_thread().coordinates.block; }
dim3 block_size() { return current_thread().coordinates.block_size; }
dim3 grid_size() { return current_thread().coordinates.grid_size; }

uint32_t shared_window_address(const void* pointer) { return shared_address(pointer); }

void sync_threads() {
  const int num_threads = static_cast<int>(block_threads().size());
  bar_sync(0, (num_threads + kWarpThreads - 1) / kWarpThreads * kWarpThreads);
}

void sync_warp(unsigned mask) {
  require_all_lanes(mask);
  warp_sync();
}

uint32_t shuffle_from(unsigned mask, uint32_t bits, int lane) {
  require_all_lanes(mask);
  return shuffle(bits, lane);
}

void begin_atomic(const void* global, int64_t bytes) {
  preemption_point();
  check_device_access(global, bytes, "an atomic operation");
}

void trap() { fail("__trap()"); }

uint32_t ballot_of(unsigned mask, bool predicate) {
  require_all_lanes(mask);
  return ballot(predicate);
}

}  // namespace drope::emulation
