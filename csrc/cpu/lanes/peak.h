// How fast this CPU multiplies and adds when nothing else happens: what kernels are measured
// against.
#pragma once

#include "cpu/lanes/gemm.h"
#include "cpu/thread_seconds.h"

namespace drope::DROPE_ISA {

// The micro-kernel's accumulators, operands that never leave their registers.
template <class Dot>
float multiply_add_repeatedly(Vec a, Vec b, int64_t repeats) {
  Vec acc[kRows][kMaxVecs];
  for (int r = 0; r < kRows; ++r) {  // different, or the compiler would keep one of them
    for (int v = 0; v < kMaxVecs; ++v)
      acc[r][v] = a + broadcast(static_cast<float>(r * kMaxVecs + v));
  }
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kMaxVecs; ++v) acc[r][v] = Dot::multiply_add(a, b, acc[r][v]);
    }
  }
  Vec sum = zero();
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kMaxVecs; ++v) sum = sum + acc[r][v];
  }
  return sum_lanes(sum);
}

template <class Dot>
double multiply_add_peak_of(double seconds) {
  constexpr int64_t kRepeats = 20000;
  constexpr double kFlops = 2.0 * kRepeats * kRows * kMaxVecs * kLanes * Dot::kDepth;
  volatile float operand = 0.0f, sink;  // volatile: the compiler must not know the values
  const Vec a = broadcast(operand), b = broadcast(operand);
  const double begin = thread_seconds();
  double elapsed = 0.0, flops = 0.0;
  while (elapsed < seconds || flops == 0.0) {
    sink = multiply_add_repeatedly<Dot>(a, b, kRepeats);
    flops += kFlops;
    elapsed = thread_seconds() - begin;
  }
  static_cast<void>(sink);
  return flops / elapsed;
}

inline double multiply_add_peak(DType dtype, double seconds) {
  return dtype == DType::kBFloat16 ? multiply_add_peak_of<DotForBFloat16>(seconds)
                                   : multiply_add_peak_of<DotFloat32>(seconds);
}

}  // namespace drope::DROPE_ISA
