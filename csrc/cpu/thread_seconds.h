// The clock of peaks: processor time of the calling thread.
#pragma once

#include <ctime>

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

DROPE_INLINE double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace drope::DROPE_ISA
