// The CUDA kernels as the rest of the package calls them: checks, workspace, choice of the kernel,
// launches on the caller's stream and current device. Nothing is allocated, nothing waits, no
// device value is read, so that every call can be captured into a CUDA graph.
#pragma once

#include <cstdint>

#include "attention_params.h"
#include "cuda/heuristics.h"

namespace drope::cuda {

struct CudaOptions {
  Family family = Family::kSm80;  // forward only; backward and decode run the sm_80 kernels
  void* stream = nullptr;         // cudaStream_t
  void* workspace = nullptr;      // 16-byte aligned device memory, of the bytes asked for below
  bool deterministic = false;     // backward: the same bits on every run
};

int64_t attention_forward_workspace_bytes(const AttentionForwardParams& params,
                                          const CudaOptions& options);
int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params,
                                           const CudaOptions& options);
int64_t attention_decode_workspace_bytes(const AttentionDecodeParams& params,
                                         const CudaOptions& options);

// All, those above too, throw std::invalid_argument for sizes that no kernel serves, before any
// launch, and std::runtime_error with the CUDA error's name, the shape and the kernel when a launch
// fails. The device then stays usable: the failed launch has not run.
void attention_forward_cuda(const AttentionForwardParams& params, const CudaOptions& options);
void attention_backward_cuda(const AttentionBackwardParams& params, const CudaOptions& options);
// params' num_splits, partial_out and partial_state are chosen here.
void attention_decode_cuda(const AttentionDecodeParams& params, const CudaOptions& options);

}  // namespace drope::cuda
