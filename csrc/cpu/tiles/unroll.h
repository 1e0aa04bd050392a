// Loops over registers, which have to be constants.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/vec/inline.h"

namespace drope::DROPE_ISA {

#define DROPE_INLINE_LAMBDA __attribute__((always_inline))

template <int kCount, class Body, int... kIndices>
DROPE_INLINE void unroll(const Body& body, std::integer_sequence<int, kIndices...>) {
  (body(std::integral_constant<int, kIndices>{}), ...);
}
// body(0), body(1), ..., kCount of them, each index a constant.
template <int kCount, class Body>
DROPE_INLINE void unroll(const Body& body) {
  unroll<kCount>(body, std::make_integer_sequence<int, kCount>{});
}

}  // namespace drope::DROPE_ISA
