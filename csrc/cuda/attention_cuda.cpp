#include "cuda/attention_cuda.h"

#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/attention/shared/launch.h"
#include "cuda/check_params.h"
#include "cuda/device.h"
#include "cuda/tensor_map.h"
#include "cuda/workspace.h"

namespace drope::cuda {
namespace {

template <class Launch>
struct Kernel {
  Family family;
  int head_dim;
  Launch* launch;
};

constexpr Kernel<LaunchForward> kForward[] = {
    {Family::kSm80, 64, launch_forward_sm80_d64},   {Family::kSm80, 96, launch_forward_sm80_d96},
    {Family::kSm80, 128, launch_forward_sm80_d128}, {Family::kSm80, 256, launch_forward_sm80_d256},
    {Family::kSm90, 64, launch_forward_sm90_d64},   {Family::kSm90, 128, launch_forward_sm90_d128}};
constexpr Kernel<LaunchBackward> kBackward[] = {{Family::kSm80, 64, launch_backward_sm80_d64},
                                                {Family::kSm80, 96, launch_backward_sm80_d96},
                                                {Family::kSm80, 128, launch_backward_sm80_d128},
                                                {Family::kSm80, 256, launch_backward_sm80_d256}};
constexpr Kernel<LaunchDecode> kDecode[] = {{Family::kSm80, 64, launch_decode_sm80_d64},
                                            {Family::kSm80, 96, launch_decode_sm80_d96},
                                            {Family::kSm80, 128, launch_decode_sm80_d128},
                                            {Family::kSm80, 256, launch_decode_sm80_d256}};

template <class Launch, std::size_t kSize>
const Kernel<Launch>& find_kernel(const Kernel<Launch> (&kernels)[kSize], Family family,
                                  const AttentionParams& p) {
  const int head_dim = head_dim_config(family, p.head_dim, p.head_dim_v);
  for (const Kernel<Launch>& kernel : kernels) {
    if (kernel.family == family && kernel.head_dim == head_dim) return kernel;
  }
  throw std::invalid_argument("no CUDA kernel holds head_dim " + std::to_string(p.head_dim) +
                              " and head_dim_v " + std::to_string(p.head_dim_v));
}

template <class Launch>
std::string name_of(const char* pass, const Kernel<Launch>& kernel) {
  return std::string(pass) + "_sm" + std::to_string(static_cast<int>(kernel.family)) + "_d" +
         std::to_string(kernel.head_dim);
}

void check_launch(cudaError_t status, const std::string& name, const AttentionParams& p) {
  if (status == cudaSuccess) return;
  std::ostringstream text;
  text << name << " could not be launched for B=" << p.batch << " Hq=" << p.num_heads_q
       << " Hkv=" << p.num_heads_kv << " Sq=" << p.seqlen_q << " Skv=" << p.seqlen_kv
       << " D=" << p.head_dim << " Dv=" << p.head_dim_v;
  check_cuda(status, text.str());
}

// Where TMA cannot go, the sm_80 kernel can.
Family forward_family(const AttentionParams& p, Family wanted) {
  const bool is_served =
      wanted == Family::kSm90 && head_dim_config(wanted, p.head_dim, p.head_dim_v) != 0 &&
      has_tensor_map(queries_of(p)) && has_tensor_map(keys_of(p)) && has_tensor_map(values_of(p));
  return is_served ? Family::kSm90 : Family::kSm80;
}

cudaStream_t stream_of(const CudaOptions& options) {
  return static_cast<cudaStream_t>(options.stream);
}

// Null where nothing rotates or the caller keeps the keys.
void* take_prepared_keys(const AttentionForwardParams& p, Workspace& workspace) {
  if (p.rotary.rotary_dim == 0 || p.k_prepared != nullptr) return p.k_prepared;
  return workspace.take<uint16_t>(p.batch * p.num_heads_kv * p.seqlen_kv * p.head_dim);
}

// The sm_90a kernel's blocks ask here for their next tile.
int32_t* take_tile_count(const CudaOptions& options, Workspace& workspace) {
  return options.family == Family::kSm90 ? workspace.take<int32_t>(1) : nullptr;
}

// Rotates the keys; k of the params returned are the rotated ones.
AttentionForwardParams prepare_keys(const AttentionForwardParams& params, void* k_prepared,
                                    cudaStream_t stream) {
  AttentionForwardParams p = params;
  if (p.rotary.rotary_dim == 0) return p;
  if (p.batch > 0 && p.seqlen_kv > 0) {
    check_launch(launch_prepare_keys(params, k_prepared, stream), "prepare_keys", p);
  }
  p.k = k_prepared;
  p.stride_k_row = p.head_dim;
  p.stride_k_head = p.seqlen_kv * p.stride_k_row;
  p.stride_k_batch = p.num_heads_kv * p.stride_k_head;
  return p;
}

// The params with their number of splits and the partial results these need.
AttentionDecodeParams split_decode(const AttentionDecodeParams& params, Workspace& workspace) {
  AttentionDecodeParams p = params;
  const int64_t group_rows = p.num_heads_q / p.num_heads_kv * p.seqlen_q;
  const DecodeBlock block =
      decode_block(head_dim_config(Family::kSm80, p.head_dim, p.head_dim_v), group_rows);
  const int64_t num_tiles = p.batch * p.num_heads_kv * ceil_div(group_rows, block.rows);
  const int64_t num_slots = int64_t{current_device().num_sms} * block.blocks_per_sm;
  p.num_splits = num_decode_splits(num_tiles, ceil_div(p.seqlen_kv, block.keys), num_slots);
  if (p.num_splits > 1) {
    const int64_t num_rows = p.num_splits * p.batch * p.num_heads_q * p.seqlen_q;
    p.partial_out = workspace.take<float>(num_rows * p.head_dim_v);
    p.partial_state = workspace.take<float>(2 * num_rows);
  }
  return p;
}

}  // namespace

int64_t attention_forward_workspace_bytes(const AttentionForwardParams& params,
                                          const CudaOptions& options) {
  check_params(params);
  Workspace workspace(nullptr);
  take_prepared_keys(params, workspace);
  take_tile_count(options, workspace);
  return workspace.num_bytes();
}

void attention_forward_cuda(const AttentionForwardParams& params, const CudaOptions& options) {
  check_params(params);
  Workspace workspace(options.workspace);
  void* const k_prepared = take_prepared_keys(params, workspace);
  AttentionForwardParams p = prepare_keys(params, k_prepared, stream_of(options));
  p.num_tiles_taken = take_tile_count(options, workspace);
  if (p.batch == 0 || p.seqlen_q == 0) return;
  const auto& kernel = find_kernel(kForward, forward_family(p, options.family), p);
  check_launch(kernel.launch(p, stream_of(options)), name_of("attention_forward", kernel), p);
}

int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params,
                                           const CudaOptions& options) {
  check_params(params);
  Workspace workspace(nullptr);
  backward_workspace(params, options.deterministic, workspace);
  return workspace.num_bytes();
}

void attention_backward_cuda(const AttentionBackwardParams& params, const CudaOptions& options) {
  check_params(params);
  Workspace workspace(options.workspace);
  const BackwardWorkspace parts = backward_workspace(params, options.deterministic, workspace);
  if (params.batch == 0) return;
  const auto& kernel = find_kernel(kBackward, Family::kSm80, params);
  check_launch(kernel.launch(params, parts, stream_of(options)),
               name_of("attention_backward", kernel), params);
}

int64_t attention_decode_workspace_bytes(const AttentionDecodeParams& params, const CudaOptions&) {
  check_params(params);
  Workspace workspace(nullptr);
  split_decode(params, workspace);
  return workspace.num_bytes();
}

void attention_decode_cuda(const AttentionDecodeParams& params, const CudaOptions& options) {
  check_params(params);
  Workspace workspace(options.workspace);
  const AttentionDecodeParams p = split_decode(params, workspace);
  if (p.batch == 0) return;
  const auto& kernel = find_kernel(kDecode, Family::kSm80, p);
  check_launch(kernel.launch(p, stream_of(options)), name_of("attention_decode", kernel), p);
}

}  // namespace drope::cuda
