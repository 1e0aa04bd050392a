// What the calls of the CUDA kernels have beyond those of attention_arguments.h.
#pragma once

#include "attention_arguments.h"
#include "cuda/attention_cuda.h"

namespace drope {

void register_cuda_attention_backward(pybind11::module_& module);
void register_cuda_attention_decode(pybind11::module_& module);
void register_cuda_attention_forward(pybind11::module_& module);

// Where and how to run. `allocate` is the caller's function of a number of bytes that returns the
// address of as much device memory; it is called only if memory is needed.
class CudaLaunch {
 public:
  explicit CudaLaunch(CallArguments& in) : allocate_(in.value<pybind11::function>("allocate")) {
    options_.family = static_cast<cuda::Family>(in.value<int>("family"));
    options_.stream = in.pointer<void>("stream");
    options_.deterministic = in.value<bool>("deterministic");
  }

  template <class Params>
  void run(const Params& p, int64_t (*workspace_bytes)(const Params&, const cuda::CudaOptions&),
           void (*attention)(const Params&, const cuda::CudaOptions&)) {
    const int64_t num_bytes = workspace_bytes(p, options_);
    if (num_bytes > 0) {
      options_.workspace = reinterpret_cast<void*>(allocate_(num_bytes).cast<uintptr_t>());
    }
    pybind11::gil_scoped_release release;
    attention(p, options_);
  }

 private:
  pybind11::function allocate_;
  cuda::CudaOptions options_;
};

}  // namespace drope
