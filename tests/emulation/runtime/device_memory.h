// Device memory: what the emulated runtime allocated, and what the host has lent.
#pragma once

#include <cstdint>

namespace drope::emulation {

void* allocate_device(int64_t bytes);  // filled with 0xff, 256-byte aligned
void free_device(void* pointer);
// Memory of the host that is lent to the device, a tensor's for instance; ranges may repeat.
void lend_to_device(void* pointer, int64_t bytes);
void take_back_from_device(void* pointer);

// Fails when any of these bytes belongs to no device memory.
void check_device_access(const void* pointer, int64_t bytes, const char* what);
// red.global.add.f32, .v2 and .v4: target[i] += values[i].
void add_global(float* target, const float* values, int num_floats);
// As above, for the host: no failure.
bool is_allocated(const void* pointer, int64_t bytes);

}  // namespace drope::emulation
