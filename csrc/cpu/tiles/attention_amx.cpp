// The kernels for AMX. Compiled with flags of its own: CMakeLists.txt. What tiles do not serve goes
// to AVX-512's float32 products, twice as fast as its bf16 ones where there is AMX.
#define DROPE_ISA amx
#define DROPE_ISA_NAME "amx"
#define DROPE_LANES avx512
#include "cpu/vec/vec_avx512.h"
// The vector type first, then the tiles.
#include "cpu/tiles/tile_amx.h"
// What is made of them.
#include "cpu/tiles/instance.h"
