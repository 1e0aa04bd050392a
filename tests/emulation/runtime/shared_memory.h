// Shared memory. Every access, ordinary or asynchronous, is checked against those before it.
#pragma once

#include <cstdint>

#include "device.h"
#include "machine.h"

namespace drope::emulation {

enum class Proxy { kGeneric, kAsync };

// Somebody who touches shared memory. Races are judged by what its clock has seen.
struct Actor {
  int agent;
  uint32_t epoch;
  const Clock* clock;
  Proxy proxy;
  const char* name;
};

Actor current_actor(const char* name);
// All lanes of the current warp, which wait for each other: what every one of them has seen. It
// may read, not write.
Actor current_warp_actor(const char* name);

void begin_shared_memory(unsigned size);
unsigned char* dynamic_shared_memory();
extern unsigned char g_shared_memory[];
inline bool is_shared(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(g_shared_memory) <
         kMaxSharedBytes;
}
uint32_t shared_address(const void* pointer);
// The bytes at a shared-window address; fails when they are outside of the block's memory or not
// aligned.
unsigned char* shared_bytes(uint32_t address, uint32_t size, uint32_t alignment, const char* what);

// Each fails when the access races with an earlier one.
void note_read(const unsigned char* bytes, uint32_t size, const Actor& actor);
void note_write(const unsigned char* bytes, uint32_t size, const Actor& actor);
// An mbarrier lies here: ordinary accesses are errors from now on (or no longer).
void mark_barrier(const unsigned char* bytes, bool is_barrier);

// fence.proxy.async: what the thread wrote, and what it has seen others write, is for both proxies.
void fence_proxy_async();

void poison(unsigned char* bytes, uint32_t size);

}  // namespace drope::emulation
