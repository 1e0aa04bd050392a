// The kernels for AVX-512 with bf16 dot products. Compiled with flags of its own: CMakeLists.txt.
#define DROPE_ISA avx512bf16
#include "cpu/vec/vec_avx512.h"
// The vector type first.
#include "cpu/lanes/instance.h"
