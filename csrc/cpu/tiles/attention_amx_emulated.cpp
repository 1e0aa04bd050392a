// The kernels for AMX on machines without it, to test them. Compiled with flags of its own:
// CMakeLists.txt, which also says whose lanes take what tiles do not serve.
#define DROPE_ISA amx_emulated
#define DROPE_ISA_NAME "amx-emulated"
#include "cpu/vec/vec_wide.h"
// The vector type first, then the tiles.
#include "cpu/tiles/tile_emulated.h"
// What is made of them.
#include "cpu/tiles/instance.h"
