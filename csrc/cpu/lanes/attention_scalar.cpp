// The kernels for any CPU. Compiled with flags of its own: CMakeLists.txt.
#define DROPE_ISA scalar
#include "cpu/vec/vec_scalar.h"
// The vector type first.
#include "cpu/lanes/instance.h"
