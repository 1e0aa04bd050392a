// The kernels for AVX-512 F, BW, DQ and VL. Compiled with flags of its own: CMakeLists.txt.
#define DROPE_ISA avx512
#include "cpu/vec/vec_avx512.h"
// The vector type first.
#include "cpu/lanes/instance.h"
