#include "cuda/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

#include "cuda/device.h"

namespace drope::cuda {
namespace {

constexpr int kRank = 4;
constexpr int64_t kElementBytes = 2;
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;

using EncodeTiled = PFN_cuTensorMapEncodeTiled_v12000;

EncodeTiled find_encode_tiled() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                              cudaEnableDefault, &found),
             "asking the driver for cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; it needs CUDA 12.0");
  }
  return reinterpret_cast<EncodeTiled>(entry);
}

CUtensorMapSwizzle swizzle_of(int64_t span_bytes) {
  switch (span_bytes) {
    case 32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case 64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case 128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      throw std::invalid_argument("tensor map: a box is 16, 32 or 64 channels wide");
  }
}

// Bytes; any legal number where the dimension has a single index.
int64_t stride_bytes(int64_t extent, int64_t stride) {
  return extent > 1 ? stride * kElementBytes : 16;
}

std::string describe(const HeadTensor& t, int box_rows, int box_channels) {
  std::ostringstream text;
  text << "tensor map of " << t.name << ": (batch, heads, rows, channels) = (" << t.batch << ", "
       << t.num_heads << ", " << t.num_rows << ", " << t.channels << "), strides ("
       << t.stride_batch << ", " << t.stride_head << ", " << t.stride_row << ", 1), box "
       << box_rows << " x " << box_channels << ", address " << t.data;
  return text.str();
}

}  // namespace

bool has_tensor_map(const HeadTensor& t) {
  if (t.num_rows < 1 || t.batch < 1 || (t.num_rows > 1 && t.stride_row == 0)) return false;
  return stride_bytes(t.num_rows, t.stride_row) < kMaxStrideBytes &&
         stride_bytes(t.num_heads, t.stride_head) < kMaxStrideBytes &&
         stride_bytes(t.batch, t.stride_batch) < kMaxStrideBytes;
}

HeadTensorMap encode_tensor_map(const HeadTensor& t, int box_rows, int box_channels) {
  static const EncodeTiled encode = find_encode_tiled();
  const int64_t num_heads = t.stride_head == 0 ? 1 : t.num_heads;
  const int64_t batch = t.stride_batch == 0 ? 1 : t.batch;
  const cuuint64_t dims[kRank] = {
      static_cast<cuuint64_t>(t.channels), static_cast<cuuint64_t>(t.num_rows),
      static_cast<cuuint64_t>(num_heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[kRank - 1] = {
      static_cast<cuuint64_t>(stride_bytes(t.num_rows, t.stride_row)),
      static_cast<cuuint64_t>(stride_bytes(num_heads, t.stride_head)),
      static_cast<cuuint64_t>(stride_bytes(batch, t.stride_batch))};
  const cuuint32_t box[kRank] = {static_cast<cuuint32_t>(box_channels),
                                 static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[kRank] = {1, 1, 1, 1};
  const CUtensorMapDataType type = t.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  HeadTensorMap result{};
  result.head_step = num_heads > 1;
  result.batch_step = batch > 1;
  const CUresult status = encode(
      &result.map, type, kRank, const_cast<void*>(t.data), dims, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box_channels * kElementBytes),
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(describe(t, box_rows, box_channels) +
                             ": cuTensorMapEncodeTiled refused it, CUresult " +
                             std::to_string(static_cast<int>(status)));
  }
  return result;
}

}  // namespace drope::cuda
