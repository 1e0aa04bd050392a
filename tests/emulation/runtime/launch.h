// Running a kernel: what <<<...>>> becomes.
#pragma once

#include <cstdint>
#include <tuple>

#include "../cuda/dim3.h"

namespace drope::emulation {

constexpr unsigned kMaxBlockThreads = 1024;

struct LaunchShape {
  dim3 grid, block;
  unsigned shared_bytes;
};

// What every thread calls.
struct KernelCall {
  void (*body)(void*);
  void* argument;
  uintptr_t argument_bytes;  // the kernel's parameters lie there
};

// Runs all blocks, one after the other. A failure is kept as launch_error().
void run_kernel(const void* kernel, const LaunchShape& shape, const KernelCall& call);

void allow_shared_bytes(const void* kernel, unsigned bytes);
// A cudaError_t, 0 when every launch since the last clear succeeded; the message stays readable
// through emulation_error().
int launch_error();
void clear_launch_error();

// Arguments become parameters once, by the host.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned shared_bytes,
            const Arguments&... arguments) {
  struct Launched {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } launched{kernel, {arguments...}};
  const KernelCall call{[](void* given) {
                          const auto& one = *static_cast<Launched*>(given);
                          std::apply(one.kernel, one.parameters);
                        },
                        &launched, sizeof(launched)};
  run_kernel(reinterpret_cast<const void*>(kernel), {grid, block, shared_bytes}, call);
}

}  // namespace drope::emulation
