#include "history.h"

#include <algorithm>

namespace drope::emulation {

void History::begin(uint32_t bytes) {
  granules_.assign((bytes + kGranuleBytes - 1) / kGranuleBytes, Granule());
  splits_.clear();
  free_splits_.clear();
}

void History::split_bytes(Granule& granule) {
  if (free_splits_.empty()) {
    free_splits_.push_back(static_cast<int>(splits_.size()));
    splits_.emplace_back();
  }
  granule.split = free_splits_.back();
  free_splits_.pop_back();
  std::fill_n(splits_[granule.split].bytes, kGranuleBytes, granule.whole);
}

void History::join_bytes(Granule& granule) {
  if (granule.split < 0) return;
  granule.whole = splits_[granule.split].bytes[0];
  free_splits_.push_back(granule.split);
  granule.split = -1;
}

}  // namespace drope::emulation
