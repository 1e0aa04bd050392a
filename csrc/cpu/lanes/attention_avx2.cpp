// The kernels for AVX2, FMA and F16C. Compiled with flags of its own: CMakeLists.txt.
#define DROPE_ISA avx2
#include "cpu/vec/vec_avx2.h"
// The vector type first.
#include "cpu/lanes/instance.h"
