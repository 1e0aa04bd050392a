#include "tensor_map.h"

#include <cstring>

#include "device_memory.h"
#include "machine.h"

namespace drope::emulation {
namespace {

constexpr uint32_t kMagic = 0x7e4504a9;

int element_bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    default:
      return 0;
  }
}

bool dimensions_are_legal(const TensorMap& map, const cuuint64_t* dims, const cuuint64_t* strides,
                          const cuuint32_t* box, const cuuint32_t* element_strides) {
  for (int i = 0; i < map.rank; ++i) {
    if (dims[i] < 1 || dims[i] > (uint64_t{1} << 32) || box[i] < 1 || box[i] > 256) return false;
    if (element_strides[i] != 1) return false;  // legal, not emulated
    if (i + 1 == map.rank) break;
    if (strides[i] % 16 != 0 || strides[i] >= (uint64_t{1} << 40)) return false;
    if (strides[i] == 0 && dims[i + 1] > 1) return false;  // the driver's answer is not known
  }
  const uint32_t row_bytes = box[0] * map.element_bytes;
  return row_bytes % 16 == 0 && (map.swizzle == 0 || row_bytes <= (16u << map.swizzle));
}

}  // namespace

uint32_t TensorMap::box_bytes() const {
  uint32_t bytes = element_bytes;
  for (int i = 0; i < rank; ++i) bytes *= box[i];
  return bytes;
}

unsigned char* TensorMap::global(const int* start, uint32_t index) const {
  int64_t offset = 0;
  bool is_inside = true;
  for (int i = 0; i < rank; ++i) {
    const int64_t coordinate = static_cast<int64_t>(start[i]) + index % box[i];
    index /= box[i];
    is_inside &= coordinate >= 0 && coordinate < dim[i];
    offset += coordinate * static_cast<int64_t>(stride[i]);
  }
  return is_inside ? base + offset : nullptr;
}

const TensorMap& as_tensor_map(const void* map) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("tensor map: not aligned to 64 bytes");
  const TensorMap& encoded = *static_cast<const TensorMap*>(map);
  if (encoded.magic != kMagic) fail("tensor map: not encoded by cuTensorMapEncodeTiled");
  return encoded;
}

}  // namespace drope::emulation

using namespace drope::emulation;

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* global, const cuuint64_t* dims, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap encoded{};
  encoded.base = static_cast<unsigned char*>(global);
  encoded.rank = static_cast<uint8_t>(rank);
  encoded.element_bytes = static_cast<uint8_t>(element_bytes_of(type));
  encoded.swizzle = static_cast<uint8_t>(swizzle);
  encoded.type = static_cast<uint8_t>(type);
  encoded.magic = kMagic;
  const bool is_emulated = encoded.element_bytes > 0 && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                           interleave == CU_TENSOR_MAP_INTERLEAVE_NONE;
  if (!is_emulated || rank < 1 || rank > kMaxRank || swizzle > CU_TENSOR_MAP_SWIZZLE_128B ||
      reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 ||
      !dimensions_are_legal(encoded, dims, strides, box, element_strides)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  int64_t extent = encoded.element_bytes;
  for (cuuint32_t i = 0; i < rank; ++i) {
    encoded.stride[i] = i == 0 ? encoded.element_bytes : strides[i - 1];
    encoded.dim[i] = static_cast<uint32_t>(dims[i]);
    encoded.box[i] = static_cast<uint16_t>(box[i]);
    extent += static_cast<int64_t>((dims[i] - 1) * encoded.stride[i]);
  }
  if (!is_allocated(global, extent)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}
