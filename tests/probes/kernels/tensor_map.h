// Host side: tensor maps without linking libcuda.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace drope::probes {

// A row-major tensor, innermost dimension first, and the box that one copy moves.
struct TensorMapShape {
  CUtensorMapDataType type;
  int rank;
  int element_bytes;
  const int32_t* dims;  // rank
  const int32_t* box;   // rank
  int swizzle;          // CUtensorMapSwizzle: 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes
};

// Returns a cudaError_t; cudaErrorInvalidValue when the driver refuses the map.
inline cudaError_t encode_tensor_map(CUtensorMap* map, void* global, const TensorMapShape& shape) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                              12000, cudaEnableDefault, &found);
  if (status != cudaSuccess) return status;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;

  cuuint64_t dims[5], strides[5];
  cuuint32_t box[5], element_strides[5];
  cuuint64_t pitch = shape.element_bytes;
  for (int i = 0; i < shape.rank; ++i) {
    dims[i] = shape.dims[i];
    box[i] = shape.box[i];
    element_strides[i] = 1;
    pitch *= dims[i];
    strides[i] = pitch;  // bytes between neighbours along dimension i + 1
  }
  const auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  const CUresult result =
      encode(map, shape.type, shape.rank, global, dims, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(shape.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace drope::probes
