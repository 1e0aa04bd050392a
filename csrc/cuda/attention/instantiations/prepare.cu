#include "cuda/attention/forward/prepare.h"
#include "cuda/attention/shared/launch.h"
#include "cuda/attention/shared/launch_kernel.h"
#include "cuda/device.h"
#include "cuda/ptx/element.h"

namespace drope::cuda {
namespace {

template <int kHeadDim, class T>
cudaError_t launch_prepare(const AttentionParams& params, void* k_prepared, cudaStream_t stream) {
  using Config = PrepareConfig<kHeadDim>;
  const TileSchedule schedule = key_tiles<Config::BLOCK_KV>(params, current_device().l2_bytes);
  if (schedule.num_tiles == 0) return cudaSuccess;
  return launch_kernel(prepare_keys_kernel<Config, T>,
                       dim3(static_cast<unsigned>(schedule.num_tiles)), Config::kNumThreads,
                       sizeof(typename Config::Smem), stream, params, schedule,
                       static_cast<uint16_t*>(k_prepared));
}

template <class T>
cudaError_t launch_prepare(const AttentionParams& params, void* k_prepared, cudaStream_t stream) {
  if (params.head_dim <= 64) return launch_prepare<64, T>(params, k_prepared, stream);
  if (params.head_dim <= 128) return launch_prepare<128, T>(params, k_prepared, stream);
  return launch_prepare<256, T>(params, k_prepared, stream);
}

}  // namespace

cudaError_t launch_prepare_keys(const AttentionParams& params, void* k_prepared,
                                cudaStream_t stream) {
  return params.dtype == DType::kBFloat16
             ? launch_prepare<ptx::BFloat16>(params, k_prepared, stream)
             : launch_prepare<ptx::Float16>(params, k_prepared, stream);
}

}  // namespace drope::cuda
