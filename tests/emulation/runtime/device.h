// The emulated device as the host sees it. Tests choose; one device, current for every thread.
#pragma once

#include <cstdint>

namespace drope::emulation {

constexpr unsigned kMaxSharedBytes = 232448;     // the most that any architecture has: 227 KiB
constexpr unsigned kDefaultSharedBytes = 49152;  // of a kernel without the function attribute

struct Device {
  int major = 9, minor = 0;
  int num_sms = 4;
  unsigned shared_bytes = kMaxSharedBytes;  // per block, opt-in
  int64_t l2_bytes = int64_t{50} << 20;
};

const Device& device();

}  // namespace drope::emulation
