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

float element(const Descriptor& descriptor, int mn, int k, bool is_mn_major, ElementType type,
              const Actor& actor) {
  const uint32_t address = descriptor.address(mn, k, is_mn_major);
  const unsigned char* bytes = shared_bytes(address, 2, 2, "wgmma operand");
  note_read(bytes, 2, actor);
  uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  return to_float(bits, type);
}

// Which thread and register hold element (row, column) of a 64-row matrix of mma fragments.
struct Holder {
  int thread, column_pair;

  Holder(int row, int column)
      : thread(row / 16 * kWarpThreads + row % 8 * 4 + column % 8 / 2),
        column_pair(column / 8 * 2 + row / 8 % 2) {}
};

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

void read_a(const WgmmaProduct& product, Actor actor, const Clock* warp_clocks, MatrixA& a) {
  const WgmmaShape& shape = product.shape;
  const Descriptor descriptor(shape.a_in_registers ? 0 : shape.desc_a);
  for (int m = 0; m < kM; ++m) {
    actor.clock = &warp_clocks[m / 16];
    for (int k = 0; k < kK; ++k) {
      if (shape.a_in_registers) {
        const Holder holder(m, k);
        const uint32_t word = product.a[holder.thread][holder.column_pair];
        a[m][k] = to_float(static_cast<uint16_t>(word >> (16 * (k % 2))), shape.type);
      } else {
        a[m][k] = element(descriptor, m, k, shape.a_is_mn_major, shape.type, actor);
      }
      a[m][k] *= static_cast<float>(shape.sign_a);
    }
  }
}

void read_b(const WgmmaProduct& product, const Actor& actor, MatrixB& b) {
  const WgmmaShape& shape = product.shape;
  const Descriptor descriptor(shape.desc_b);
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < shape.n; ++n) {
      b[k][n] = element(descriptor, n, k, shape.b_is_mn_major, shape.type, actor) *
                static_cast<float>(shape.sign_b);
    }
  }
}

}  // namespace

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
  is_done = true;
  const Clock seen_by_all = earliest(warp_clocks);
  const Actor actor{agent, epoch, &seen_by_all, Proxy::kAsync, "wgmma"};
  read_a(*this, actor, warp_clocks, a);
  read_b(*this, actor, b);
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) restore_accumulators(thread);
  for (int m = 0; m < kM; ++m) {
    float sum[kMaxN] = {};
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < shape.n; ++n) sum[n] += a[m][k] * b[k][n];
    }
    for (int n = 0; n < shape.n; ++n) {
      const Holder holder(m, n);
      float& accumulator = *d[holder.thread][2 * holder.column_pair + n % 2];
      accumulator = (shape.accumulates ? accumulator : 0.0f) + sum[n];
    }
  }
}

}  // namespace drope::emulation
