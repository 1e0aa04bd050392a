// Launch geometry, seen by kernels and by the runtime.
#pragma once

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace drope::emulation {

// Of the thread that is running.
struct Coordinates {
  dim3 thread, block, block_size, grid_size;
};

}  // namespace drope::emulation
