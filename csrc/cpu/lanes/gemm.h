// The register-blocked matrix products that every CPU kernel is made of.
#pragma once

#include <cstdint>

#include "cpu/lanes/dot.h"

namespace drope::DROPE_ISA {

template <int kRowCount, int kVecCount>
using Accumulators = Vec[kRowCount][kVecCount];

template <int kRowCount, int kVecCount>
DROPE_INLINE void clear(Accumulators<kRowCount, kVecCount>& acc) {
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecCount; ++v) acc[r][v] = zero();
  }
}

// Where the broadcast operand of a product lies: word (r, k) is data[r * stride_row + k *
// stride_k].
struct Broadcasts {
  const float* data;
  int64_t stride_row, stride_k;
};

// A packed panel of kRows rows, (depth, kRows).
DROPE_INLINE Broadcasts panel(const float* data) { return {data, 1, kRows}; }

// acc[r][first_vec + v] += sum over k < depth of a(r, k) * b[k * ldb + v * kLanes], v from 0 to
// kVecCount - first_vec - 1.
template <class Dot, int kFirstVec, int kRowCount, int kVecCount>
DROPE_INLINE void multiply_accumulate(Broadcasts a, const float* b, int64_t ldb, int64_t depth,
                                      Accumulators<kRowCount, kVecCount>& acc) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    // Panels stream through once per tile; 1 KiB ahead gained 1 to 2 points of the FMA peak.
    __builtin_prefetch(a.data + 256);
    Vec b_k[kVecCount];
#pragma GCC unroll 8
    for (int v = kFirstVec; v < kVecCount; ++v) b_k[v] = load(b + (v - kFirstVec) * kLanes);
    b += ldb;
#pragma GCC unroll 8
    for (int r = 0; r < kRowCount; ++r) {
      const Vec a_rk = broadcast(a.data[r * a.stride_row]);
#pragma GCC unroll 8
      for (int v = kFirstVec; v < kVecCount; ++v) {
        acc[r][v] = Dot::multiply_add(a_rk, b_k[v], acc[r][v]);
      }
    }
    a.data += a.stride_k;
  }
}

}  // namespace drope::DROPE_ISA
