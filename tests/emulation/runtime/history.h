// The history of shared memory: who wrote and read each byte last, and whether the async
// proxy may see it. Sixteen bytes that were always touched together share one history.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.h"

namespace drope::emulation {

constexpr int kMaxReaders = 8;  // more concurrent readers of a byte are forgotten
constexpr uint32_t kGranuleBytes = 16;

struct Stamp {
  uint32_t epoch = 0;  // 0: nobody
  uint16_t agent = 0;
};

struct ByteHistory {
  Stamp write;
  Stamp reads[kMaxReaders];
  Stamp fence;                   // the proxy fence after the last ordinary write
  uint16_t unfenced_writer = 0;  // thread + 1, when only ordinary accesses may see the byte
  bool in_barrier = false;
};

struct Granule {
  ByteHistory whole;
  int split = -1;  // place of its bytes' own histories, once they differ
};

class History {
 public:
  void begin(uint32_t bytes);

  // visit(history, offset of its first byte) for whatever covers [offset, offset + size).
  template <typename Visit>
  void visit(uint32_t offset, uint32_t size, const Visit& visit_one) {
    const uint32_t end = offset + size;
    for (uint32_t at = offset; at < end;) {
      const uint32_t granule_end = at / kGranuleBytes * kGranuleBytes + kGranuleBytes;
      const uint32_t part_end = end < granule_end ? end : granule_end;
      visit_part(at, part_end, visit_one);
      at = part_end;
    }
  }

  // As visit, for what leaves the same history in every byte that it visits.
  template <typename Visit>
  void visit_uniformly(uint32_t offset, uint32_t size, const Visit& visit_one) {
    visit(offset, size, visit_one);
    const uint32_t first = (offset + kGranuleBytes - 1) / kGranuleBytes;
    for (uint32_t i = first; i < (offset + size) / kGranuleBytes; ++i) join_bytes(granules_[i]);
  }

 private:
  struct Split {
    ByteHistory bytes[kGranuleBytes];
  };

  template <typename Visit>
  void visit_part(uint32_t at, uint32_t end, const Visit& visit_one) {
    Granule& granule = granules_[at / kGranuleBytes];
    if (granule.split < 0) {
      if (end - at == kGranuleBytes) return visit_one(granule.whole, at);
      split_bytes(granule);
    }
    ByteHistory* bytes = splits_[granule.split].bytes;
    for (uint32_t i = at; i < end; ++i) visit_one(bytes[i % kGranuleBytes], i);
  }

  void split_bytes(Granule& granule);
  void join_bytes(Granule& granule);

  std::vector<Granule> granules_;
  std::vector<Split> splits_;
  std::vector<int> free_splits_;
};

}  // namespace drope::emulation
