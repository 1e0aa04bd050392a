// PTX ISA, "Asynchronous copy": cp.async, not bulk. Its writes belong to the generic proxy.
#pragma once

#include <cstdint>

namespace drope::emulation {

void begin_cp_async();
// 16 bytes, the first source_bytes from global memory and the rest zeros.
void cp_async_16(uint32_t address, const void* global, int source_bytes);
void cp_async_commit_group();
void cp_async_wait_group(int num_pending);
void end_cp_async();  // fails when copies are left that nobody waited for

}  // namespace drope::emulation
