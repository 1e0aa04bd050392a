// Subnormal numbers are 0 while an object of this type lives, as they are to tile products: vector
// instructions would take ten times as long on them.
#pragma once

#ifdef __SSE__
#include <immintrin.h>
#endif

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

#ifdef __SSE__
class FlushSubnormals {
 public:
  DROPE_INLINE FlushSubnormals() : control_(_mm_getcsr()) {
    _mm_setcsr(control_ | kResultsToZero | kOperandsAreZero);
  }
  DROPE_INLINE ~FlushSubnormals() { _mm_setcsr(control_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kResultsToZero = 0x8000, kOperandsAreZero = 0x0040;
  unsigned control_;
};
#else
// There are only emulated tiles here: their numbers differ by what is subnormal.
class FlushSubnormals {};
#endif

}  // namespace drope::DROPE_ISA
