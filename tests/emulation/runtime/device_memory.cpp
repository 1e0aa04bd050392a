#include "device_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <map>

#include "machine.h"

namespace drope::emulation {
namespace {

constexpr int64_t kArenaBytes = int64_t{1} << 32;  // address space, not memory
constexpr int64_t kAlignment = 256, kGap = 4096;

using Address = const unsigned char*;

std::map<Address, int64_t> g_allocations;
std::map<Address, int64_t>::const_iterator g_last = g_allocations.end();
unsigned char* g_arena = nullptr;
int64_t g_used = 0;

bool in_arena(const void* pointer) {
  const Address address = static_cast<Address>(pointer);
  return g_arena && address >= g_arena && address < g_arena + kArenaBytes;
}

bool holds(std::map<Address, int64_t>::const_iterator one, Address address, int64_t bytes) {
  return address >= one->first && address + bytes <= one->first + one->second;
}

}  // namespace

void* allocate_device(int64_t bytes) {
  if (!g_arena) {
    void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    g_arena = static_cast<unsigned char*>(memory);
  }
  if (g_allocations.empty()) g_used = 0;
  if (g_used + bytes + 2 * kGap > kArenaBytes) return nullptr;
  unsigned char* start = g_arena + g_used + kGap;
  g_used += (bytes + kAlignment - 1) / kAlignment * kAlignment + kGap;
  std::memset(start, 0xff, bytes);
  g_last = g_allocations.emplace(start, bytes).first;
  return start;
}

void free_device(void* pointer) {
  g_allocations.erase(static_cast<Address>(pointer));
  g_last = g_allocations.end();
}

bool is_allocated(const void* pointer, int64_t bytes) {
  const Address address = static_cast<Address>(pointer);
  if (g_last != g_allocations.end() && holds(g_last, address, bytes)) return true;
  auto next = g_allocations.upper_bound(address);
  if (next == g_allocations.begin() || !holds(--next, address, bytes)) return false;
  g_last = next;
  return true;
}

void check_device_access(const void* pointer, int64_t bytes, bool must_be_device,
                         const char* what) {
  if (!must_be_device && !in_arena(pointer)) return;
  if (is_allocated(pointer, bytes)) return;
  fail("%s touches %lld bytes of global memory that no allocation holds", what,
       static_cast<long long>(bytes));
}

}  // namespace drope::emulation
