// Waiting that cannot hang: a probe of a wrong assumption must end and show its result.
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.h"

namespace drope::probes {

constexpr int kMaxPolls = 1 << 14;

// True once the phase of that parity is complete, false when it did not complete in time.
__device__ inline bool wait_or_give_up(uint64_t* barrier, uint32_t parity) {
  for (int poll = 0; poll < kMaxPolls; ++poll) {
    if (ptx::mbarrier_try_wait_parity(barrier, parity)) return true;
  }
  return false;
}

}  // namespace drope::probes
