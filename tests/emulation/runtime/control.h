// What the test chooses, and what it asks afterwards.
#pragma once

#include <cstdint>

namespace drope::emulation {

enum class Event : int {
  kBarSync,
  kBulkLoad,
  kBulkStore,
  kCpAsync,
  kElect,
  kLdmatrix,
  kMbarrierArrive,
  kMbarrierWait,
  kMma,
  kProxyFence,
  kRedGlobal,
  kShuffle,
  kStmatrix,
  kTensorLoad,
  kTensorStore,
  kWgmma,
  kNumEvents,
};

// Counts one operation: of a warp, a warpgroup or a thread, whoever executes it as one.
void count(Event event);
uint64_t seed();
void set_error(const char* message);

}  // namespace drope::emulation
