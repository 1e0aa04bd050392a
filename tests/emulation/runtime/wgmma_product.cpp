#include "wgmma_product.h"

#include <algorithm>
#include <cstring>

namespace drope::emulation {
namespace {

constexpr int kM = 64, kK = 16, kMaxN = 256;
constexpr uint64_t kReservedBits = 0x3fffc000c000c000ull;  // base offset, and between the fields

// PTX ISA, "Matrix descriptor".
struct Descriptor {
  uint32_t start, leading_bytes, stride_bytes, layout;

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading_bytes(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride_bytes(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        layout(static_cast<uint32_t>(bits >> 62)) {
    if (bits & kReservedBits) fail("matrix descriptor: a reserved bit or base offset is set");
  }

  // Swizzle span in bytes; 16 without swizzle.
  uint32_t span() const { return layout == 0 ? 16 : 256u >> layout; }

  // "Shared Memory Matrix Layout", 16-bit elements, before the swizzle.
  uint32_t offset(uint32_t mn, uint32_t k, bool is_mn_major) const {
    const uint32_t columns = span() / 2;
    if (!is_mn_major) {
      const uint32_t chunk = layout == 0 ? leading_bytes : 16;
      return mn / 8 * stride_bytes + mn % 8 * span() + k / 8 * chunk + 2 * (k % 8);
    }
    if (layout == 0) {
      return mn / 8 * stride_bytes + 2 * (mn % 8) + k % 8 * 16 + k / 8 * leading_bytes;
    }
    return mn / columns * leading_bytes + 2 * (mn % columns) + k % 8 * span() +
           k / 8 * stride_bytes;
  }

  uint32_t address(uint32_t mn, uint32_t k, bool is_mn_major) const {
    const uint32_t plain = start + offset(mn, k, is_mn_major);
    return plain ^ (((plain >> 7) & (span() / 16 - 1)) << 4);
  }
};

constexpr int kChunk = 8;  // elements of 16 bytes: consecutive in every layout

// Elements mn .. mn + 7 at k when MN-major, else k .. k + 7 at mn.
void read_chunk(float* values, const Descriptor& descriptor, int mn, int k, bool is_mn_major,
                ElementType type, const Actor& actor) {
  const uint32_t address = descriptor.address(mn, k, is_mn_major);
  const unsigned char* bytes = shared_bytes(address, 16, 16, "wgmma operand");
  note_read(bytes, 16, actor);
  uint16_t bits[kChunk];
  std::memcpy(bits, bytes, sizeof(bits));
  for (int i = 0; i < kChunk; ++i) values[i] = to_float(bits[i], type);
}

constexpr uint32_t kPoison = 0x7fc0dead;  // a quiet NaN: arithmetic keeps it

// What all four warps have seen.
Clock earliest(const Clock* warp_clocks) {
  Clock result = warp_clocks[0];
  for (int warp = 1; warp < kWarpgroupThreads / kWarpThreads; ++warp) {
    for (size_t i = 0; i < result.size(); ++i) {
      result[i] = std::min(result[i], warp_clocks[warp][i]);
    }
  }
  return result;
}

using MatrixA = float[kM][kK];
using MatrixB = float[kK][kMaxN];

// PTX ISA, "wgmma: Register Fragments for matrix A": row and k of the first element of register i.
int fragment_row(int thread, int i) {
  return thread / kWarpThreads * 16 + thread % kWarpThreads / 4 + i % 2 * 8;
}
int fragment_k(int thread, int i) { return thread % 4 * 2 + i / 2 * 8; }

void read_a_registers(const WgmmaProduct& product, MatrixA& a) {
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = product.a[thread][i];
      float* two = &a[fragment_row(thread, i)][fragment_k(thread, i)];
      two[0] = to_float(static_cast<uint16_t>(word), product.shape.type);
      two[1] = to_float(static_cast<uint16_t>(word >> 16), product.shape.type);
    }
  }
}

void read_a_memory(const WgmmaShape& shape, Actor actor, const Clock* warp_clocks, MatrixA& a) {
  const Descriptor descriptor(shape.desc_a);
  float chunk[kChunk];
  if (!shape.a_is_mn_major) {
    for (int m = 0; m < kM; ++m) {
      actor.clock = &warp_clocks[m / 16];
      for (int k = 0; k < kK; k += kChunk) {
        read_chunk(&a[m][k], descriptor, m, k, false, shape.type, actor);
      }
    }
    return;
  }
  for (int m = 0; m < kM; m += kChunk) {
    actor.clock = &warp_clocks[m / 16];
    for (int k = 0; k < kK; ++k) {
      read_chunk(chunk, descriptor, m, k, true, shape.type, actor);
      for (int i = 0; i < kChunk; ++i) a[m + i][k] = chunk[i];
    }
  }
}

void read_b(const WgmmaShape& shape, const Actor& actor, MatrixB& b) {
  const Descriptor descriptor(shape.desc_b);
  float chunk[kChunk];
  if (shape.b_is_mn_major) {
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < shape.n; n += kChunk) {
        read_chunk(&b[k][n], descriptor, n, k, true, shape.type, actor);
      }
    }
    return;
  }
  for (int n = 0; n < shape.n; ++n) {
    for (int k = 0; k < kK; k += kChunk) {
      read_chunk(chunk, descriptor, n, k, false, shape.type, actor);
      for (int i = 0; i < kChunk; ++i) b[k + i][n] = chunk[i];
    }
  }
}

}  // namespace

void WgmmaProduct::join(int thread, float* const* accumulators, const uint32_t* a_registers) {
  has_joined[thread] = true;
  std::copy(accumulators, accumulators + num_accumulators(), d[thread]);
  const auto [low, high] = std::minmax_element(accumulators, accumulators + num_accumulators());
  const auto begin = reinterpret_cast<uintptr_t>(*low);
  span[thread] = {begin, reinterpret_cast<uintptr_t>(*high) + sizeof(float) - begin};
  if (shape.a_in_registers) std::copy(a_registers, a_registers + 4, a[thread]);
}

void WgmmaProduct::poison_accumulators(int thread) {
  is_poisoned[thread] = true;
  for (int i = 0; i < num_accumulators(); ++i) {
    saved[thread][i] = *d[thread][i];
    std::memcpy(d[thread][i], &kPoison, sizeof(kPoison));
  }
}

void WgmmaProduct::restore_accumulators(int thread) {
  if (!is_poisoned[thread]) return;
  is_poisoned[thread] = false;
  for (int i = 0; i < num_accumulators(); ++i) {
    if (std::memcmp(d[thread][i], &kPoison, sizeof(kPoison)) != 0) {
      fail("an accumulator was written while its wgmma was in flight");
    }
    *d[thread][i] = saved[thread][i];
  }
}

void WgmmaProduct::execute(int agent, const Clock* warp_clocks) {
  static MatrixA a;
  static MatrixB b;
  static float sum[kM][kMaxN];
  is_done = true;
  const Clock seen_by_all = earliest(warp_clocks);
  const Actor actor{agent, epoch, &seen_by_all, Proxy::kAsync, "wgmma"};
  if (shape.a_in_registers) {
    read_a_registers(*this, a);
  } else {
    read_a_memory(shape, actor, warp_clocks, a);
  }
  read_b(shape, actor, b);
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    restore_accumulators(thread);
    for (int i = 0; i < num_accumulators(); ++i) {
      // PTX ISA, "wgmma: Matrix D fragment".
      sum[fragment_row(thread, i / 2)][i / 4 * 8 + fragment_k(thread, 0) + i % 2] =
          shape.accumulates ? *d[thread][i] : 0.0f;
    }
  }
  // In the order of mma.sync: scores that another instruction recomputes are the same.
  const float sign = static_cast<float>(shape.sign_a * shape.sign_b);
  for (int m = 0; m < kM; ++m) {
    for (int k = 0; k < kK; ++k) {
      const float factor = sign * a[m][k];
      for (int n = 0; n < shape.n; ++n) sum[m][n] += factor * b[k][n];
    }
  }
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    for (int i = 0; i < num_accumulators(); ++i) {
      *d[thread][i] = sum[fragment_row(thread, i / 2)][i / 4 * 8 + fragment_k(thread, 0) + i % 2];
    }
  }
}

}  // namespace drope::emulation
