// Device memory: one arena, so that an access beside every allocation is recognised.
#pragma once

#include <cstdint>

namespace drope::emulation {

void* allocate_device(int64_t bytes);  // filled with 0xff, 256-byte aligned
void free_device(void* pointer);

// Fails when any of these bytes of device memory belongs to no allocation. Addresses that are not
// device memory (the thread's own stack, constants) pass unless must_be_device.
void check_device_access(const void* pointer, int64_t bytes, bool must_be_device, const char* what);
// As above, for the host: no failure.
bool is_allocated(const void* pointer, int64_t bytes);

}  // namespace drope::emulation
