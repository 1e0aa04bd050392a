// Everything that a per-ISA source file includes lives in a namespace named by DROPE_ISA and is
// always inlined: an out-of-line copy could be merged by the linker with another ISA's.
#pragma once

#ifndef DROPE_ISA
#error "define DROPE_ISA (scalar, avx2, avx512, avx512bf16) before including a kernel header"
#endif

#ifndef DROPE_INLINE
#define DROPE_INLINE inline __attribute__((always_inline))
#endif
// A stage of a kernel that keeps the registers to itself.
#define DROPE_NOINLINE __attribute__((noinline))
