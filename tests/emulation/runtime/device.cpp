#include "device.h"

namespace drope::emulation {
namespace {

Device g_device;

}  // namespace

const Device& device() { return g_device; }

}  // namespace drope::emulation

using namespace drope::emulation;

// num_sms: small, so that persistent kernels go round. False: shared_bytes is beyond the emulator.
extern "C" bool emulation_set_device(int major, int minor, int num_sms, unsigned shared_bytes) {
  if (shared_bytes > kMaxSharedBytes) return false;
  g_device.major = major;
  g_device.minor = minor;
  g_device.num_sms = num_sms;
  g_device.shared_bytes = shared_bytes;
  return true;
}
