// Probes of sm_90 data movement: stmatrix, mbarrier, bulk copies, tensor copies, wide reductions.
#include "cuda/ptx/address.h"
#include "cuda/ptx/bulk_copy.h"
#include "cuda/ptx/elect.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/reduce.h"
#include "cuda/ptx/stmatrix.h"
#include "cuda/ptx/tensor_copy.h"
#include "probe.h"
#include "tensor_map.h"
#include "wait.h"

namespace drope::probes {

constexpr int kMaxImageBytes = 64 * 1024;

enum StmatrixForm : int { kX2 = 0, kX4 = 1, kX2Trans = 2, kX4Trans = 3 };

// registers: (32, 4); offsets: (32) byte offset that each lane passes; out: 256 16-bit values
__global__ void stmatrix_kernel(const uint32_t* registers, const int32_t* offsets, uint16_t* out,
                                int form) {
  extern __shared__ __align__(1024) unsigned char smem[];
  uint16_t* values = reinterpret_cast<uint16_t*>(smem);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) values[i] = 0xeeee;
  __syncthreads();
  const uint32_t* mine = registers + lane * 4;
  const uint32_t x2[2] = {mine[0], mine[1]}, x4[4] = {mine[0], mine[1], mine[2], mine[3]};
  const uint32_t address = ptx::smem_address(smem) + offsets[lane];
  if (form == kX2) ptx::stmatrix_x2(address, x2);
  if (form == kX4) ptx::stmatrix_x4(address, x4);
  if (form == kX2Trans) ptx::stmatrix_x2_trans(address, x2);
  if (form == kX4Trans) ptx::stmatrix_x4_trans(address, x4);
  __syncthreads();
  for (int i = lane; i < 256; i += 32) out[i] = values[i];
}

// Where dynamic shared memory begins when there is no static. out: (1) int32
__global__ void smem_base_kernel(int32_t* out) {
  extern __shared__ __align__(1024) unsigned char smem[];
  out[0] = static_cast<int32_t>(ptx::smem_address(smem));
}

// One lane drives barriers through the life of two phases and notes what each test says; the
// expected answers stand beside the questions in probes_sm90.py, in this order. out: (16) int32
__global__ void mbarrier_kernel(const unsigned char* source, int32_t* out) {
  extern __shared__ __align__(1024) unsigned char smem[];
  uint64_t* barrier = reinterpret_cast<uint64_t*>(smem);
  uint64_t* counted = barrier + 1;
  unsigned char* target = smem + 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 2);
    ptx::mbarrier_init(counted, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int32_t* note = out;
  *note++ = ptx::mbarrier_test_wait_parity(barrier, 0);
  *note++ = ptx::mbarrier_test_wait_parity(barrier, 1);
  ptx::mbarrier_arrive(barrier);
  *note++ = ptx::mbarrier_test_wait_parity(barrier, 0);
  ptx::mbarrier_arrive(barrier);
  *note++ = ptx::mbarrier_test_wait_parity(barrier, 0);
  *note++ = ptx::mbarrier_test_wait_parity(barrier, 1);
  ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_arrive(barrier);
  *note++ = ptx::mbarrier_test_wait_parity(barrier, 1);
  *note++ = ptx::mbarrier_test_wait_parity(barrier, 0);

  // Half of the expected bytes leave the phase open although every thread has arrived.
  ptx::mbarrier_arrive_expect_tx(counted, 64);
  ptx::cp_async_bulk_load(ptx::smem_address(target), source, 32, counted);
  *note++ = ptx::mbarrier_test_wait_parity(counted, 0);
  ptx::cp_async_bulk_load(ptx::smem_address(target + 32), source + 32, 32, counted);
  *note++ = wait_or_give_up(counted, 0);
  *note++ = target[0] == source[0] && target[63] == source[63];

  // The copy may be issued before its bytes are expected, while an arrival is still pending.
  ptx::cp_async_bulk_load(ptx::smem_address(target), source + 64, 64, counted);
  ptx::mbarrier_arrive_expect_tx(counted, 64);
  *note++ = wait_or_give_up(counted, 1);
  *note++ = target[0] == source[64] && target[63] == source[127];

  // expect_tx alone does not arrive.
  ptx::mbarrier_expect_tx(counted, 16);
  ptx::cp_async_bulk_load(ptx::smem_address(target), source, 16, counted);
  *note++ = ptx::mbarrier_test_wait_parity(counted, 0);
  ptx::mbarrier_arrive(counted);
  *note++ = wait_or_give_up(counted, 0);
}

// The bulk round trip: source (n) float32 is loaded, doubled by ordinary stores, stored to out[0:n]
// and added onto out[n:2n]. One elected lane issues the copies.
__global__ void bulk_kernel(const float* source, float* out, int n) {
  extern __shared__ __align__(1024) unsigned char smem[];
  float* values = reinterpret_cast<float*>(smem);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(smem + n * 4);
  const int bytes = n * 4;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32 && ptx::elect_sync()) {
    ptx::mbarrier_arrive_expect_tx(barrier, bytes);
    ptx::cp_async_bulk_load(ptx::smem_address(values), source, bytes, barrier);
  }
  wait_or_give_up(barrier, 0);
  for (int i = threadIdx.x; i < n; i += blockDim.x) values[i] *= 2.0f;
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x < 32 && ptx::elect_sync()) {
    ptx::cp_async_bulk_store(out, ptx::smem_address(values), bytes);
    ptx::cp_reduce_async_bulk_add_f32(out + n, ptx::smem_address(values), bytes);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read<0>();
    ptx::cp_async_bulk_wait_group<0>();
  }
}

struct Coordinates {
  int c[4];
};

// One box into shared memory at offset 0; out receives the raw image.
__global__ void tensor_load_kernel(const __grid_constant__ CUtensorMap map, Coordinates at,
                                   int rank, int box_bytes, unsigned char* out) {
  extern __shared__ __align__(1024) unsigned char smem[];
  uint64_t* barrier = reinterpret_cast<uint64_t*>(smem + kMaxImageBytes);
  const uint32_t target = ptx::smem_address(smem);
  for (int i = threadIdx.x; i < box_bytes; i += blockDim.x) smem[i] = 0xee;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::fence_proxy_async_shared();  // the poison before the copy that overwrites it
  __syncthreads();
  const int* c = at.c;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&map);
    ptx::mbarrier_arrive_expect_tx(barrier, box_bytes);
    if (rank == 2) ptx::cp_async_bulk_tensor_2d_load(target, &map, barrier, c[0], c[1]);
    if (rank == 3) ptx::cp_async_bulk_tensor_3d_load(target, &map, barrier, c[0], c[1], c[2]);
    if (rank == 4) {
      ptx::cp_async_bulk_tensor_4d_load(target, &map, barrier, c[0], c[1], c[2], c[3]);
    }
  }
  if (!wait_or_give_up(barrier, 0)) return;  // out keeps what the host put there
  for (int i = threadIdx.x; i < box_bytes; i += blockDim.x) out[i] = smem[i];
}

// image: the box as it lies in shared memory; written or added to the mapped tensor.
__global__ void tensor_store_kernel(const __grid_constant__ CUtensorMap map, Coordinates at,
                                    int rank, int box_bytes, int add, const unsigned char* image) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const uint32_t source = ptx::smem_address(smem);
  for (int i = threadIdx.x; i < box_bytes; i += blockDim.x) smem[i] = image[i];
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x != 0) return;
  const int* c = at.c;
  if (add) {
    if (rank == 2) ptx::cp_reduce_async_bulk_tensor_2d_add(&map, source, c[0], c[1]);
    if (rank == 3) ptx::cp_reduce_async_bulk_tensor_3d_add(&map, source, c[0], c[1], c[2]);
    if (rank == 4) ptx::cp_reduce_async_bulk_tensor_4d_add(&map, source, c[0], c[1], c[2], c[3]);
  } else {
    if (rank == 2) ptx::cp_async_bulk_tensor_2d_store(&map, source, c[0], c[1]);
    if (rank == 3) ptx::cp_async_bulk_tensor_3d_store(&map, source, c[0], c[1], c[2]);
    if (rank == 4) ptx::cp_async_bulk_tensor_4d_store(&map, source, c[0], c[1], c[2], c[3]);
  }
  ptx::cp_async_bulk_commit_group();
  ptx::cp_async_bulk_wait_group<0>();
}

// How both tensor probes receive their case.
struct TensorCase {
  int32_t rank, element_bytes, swizzle, is_float, add;
  int32_t dims[4], box[4], at[4];

  int box_bytes() const {
    int bytes = element_bytes;
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    return bytes;
  }
  Coordinates coordinates() const { return {{at[0], at[1], at[2], at[3]}}; }
  cudaError_t encode(CUtensorMap* map, void* global) const {
    const CUtensorMapDataType type =
        element_bytes == 4
            ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
            : (is_float ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT16);
    return encode_tensor_map(map, global, {type, rank, element_bytes, dims, box, swizzle});
  }
};

// values: (blocks, 32, width); out: (num_slots, width), to which vector i is added at i % num_slots
__global__ void reduce_wide_kernel(const float* values, float* out, int num_slots, int width) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const float* from = values + i * width;
  float* to = out + i % num_slots * width;
  if (width == 2) ptx::red_add_v2_f32(to, from[0], from[1]);
  if (width == 4) ptx::red_add_v4_f32(to, from[0], from[1], from[2], from[3]);
}

}  // namespace drope::probes

using namespace drope::probes;

// params: form
extern "C" int probe_stmatrix(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(stmatrix_kernel, dim3(1), 32, 1024, device.a.as<uint32_t>(),
                         device.b.as<int32_t>(), device.out.as<uint16_t>(), arguments->params[0]);
  });
}

extern "C" int probe_smem_base(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(smem_base_kernel, dim3(1), 1, 64 * 1024, device.out.as<int32_t>());
  });
}

extern "C" int probe_mbarrier(const ProbeArguments* arguments) {
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(mbarrier_kernel, dim3(1), 32, 1024, device.a.as<unsigned char>(),
                         device.out.as<int32_t>());
  });
}

// params: n
extern "C" int probe_bulk(const ProbeArguments* arguments) {
  const int n = arguments->params[0];
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(bulk_kernel, dim3(1), 128, n * 4 + 64, device.a.as<float>(),
                         device.out.as<float>(), n);
  });
}

// params: a TensorCase; a: the tensor; out: the box
extern "C" int probe_tensor_load(const ProbeArguments* arguments) {
  const TensorCase& test = *reinterpret_cast<const TensorCase*>(arguments->params);
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    CUtensorMap map;
    const cudaError_t status = test.encode(&map, device.a.as<void>());
    if (status != cudaSuccess) return status;
    return launch_kernel(tensor_load_kernel, dim3(1), 128, kMaxImageBytes + 64, map,
                         test.coordinates(), test.rank, test.box_bytes(),
                         device.out.as<unsigned char>());
  });
}

// params: a TensorCase; a: the box; out: the tensor
extern "C" int probe_tensor_store(const ProbeArguments* arguments) {
  const TensorCase& test = *reinterpret_cast<const TensorCase*>(arguments->params);
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    CUtensorMap map;
    const cudaError_t status = test.encode(&map, device.out.as<void>());
    if (status != cudaSuccess) return status;
    return launch_kernel(tensor_store_kernel, dim3(1), 128, kMaxImageBytes, map, test.coordinates(),
                         test.rank, test.box_bytes(), test.add, device.a.as<const unsigned char>());
  });
}

// params: blocks, num_slots, width
extern "C" int probe_reduce_wide(const ProbeArguments* arguments) {
  const int32_t* params = arguments->params;
  return run_probe(*arguments, [&](const DeviceArguments& device) {
    return launch_kernel(reduce_wide_kernel, dim3(params[0]), 32, 0, device.a.as<float>(),
                         device.out.as<float>(), params[1], params[2]);
  });
}

extern "C" const char* probe_error_name(int status) {
  return cudaGetErrorName(static_cast<cudaError_t>(status));
}
