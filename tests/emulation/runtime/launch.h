// Running a kernel: what <<<...>>> becomes.
#pragma once

#include <cstdint>

#include "../cuda/dim3.h"

namespace drope::emulation {

constexpr unsigned kMaxSharedBytes = 232448;     // sm_90: 227 KiB
constexpr unsigned kDefaultSharedBytes = 49152;  // without the function attribute

struct LaunchShape {
  dim3 grid, block;
  unsigned shared_bytes;
};

// Runs all blocks, one after the other. A failure is kept for take_launch_error().
void run_kernel(const void* kernel, const LaunchShape& shape, void (*body)(void*), void* argument);

void allow_shared_bytes(const void* kernel, unsigned bytes);
// True once after a launch that failed; the message stays readable through emulation_error().
bool take_launch_error();

template <typename Kernel, typename Body>
void launch(Kernel* kernel, dim3 grid, dim3 block, unsigned shared_bytes, Body body) {
  run_kernel(
      reinterpret_cast<const void*>(kernel), {grid, block, shared_bytes},
      [](void* call) { (*static_cast<Body*>(call))(); }, &body);
}

}  // namespace drope::emulation
