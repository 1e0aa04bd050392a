#include "device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "control.h"
#include "machine.h"

namespace drope::emulation {
namespace {

constexpr int64_t kArenaBytes = int64_t{1} << 32;  // address space, not memory
constexpr int64_t kAlignment = 256, kGap = 4096;

using Address = const unsigned char*;

struct Range {
  int64_t bytes;
  int num_lenders;  // 0: allocated here
};

using Ranges = std::map<Address, Range>;

Ranges g_ranges;
Ranges::const_iterator g_last = g_ranges.end();
unsigned char* g_arena = nullptr;
int64_t g_used = 0;
int g_num_allocations = 0;

bool holds(Ranges::const_iterator one, Address address, int64_t bytes) {
  return address >= one->first && address + bytes <= one->first + one->second.bytes;
}

}  // namespace

void* allocate_device(int64_t bytes) {
  if (!g_arena) {
    void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    g_arena = static_cast<unsigned char*>(memory);
  }
  if (g_num_allocations == 0) g_used = 0;
  if (g_used + bytes + 2 * kGap > kArenaBytes) return nullptr;
  unsigned char* start = g_arena + g_used + kGap;
  g_used += (bytes + kAlignment - 1) / kAlignment * kAlignment + kGap;
  std::memset(start, 0xff, bytes);
  ++g_num_allocations;
  g_last = g_ranges.insert_or_assign(start, Range{bytes, 0}).first;
  return start;
}

void free_device(void* pointer) {
  g_num_allocations -= static_cast<int>(g_ranges.erase(static_cast<Address>(pointer)));
  g_last = g_ranges.end();
}

void lend_to_device(void* pointer, int64_t bytes) {
  Range& range = g_ranges.emplace(static_cast<Address>(pointer), Range{bytes, 0}).first->second;
  range.bytes = std::max(range.bytes, bytes);
  ++range.num_lenders;
}

void take_back_from_device(void* pointer) {
  const auto found = g_ranges.find(static_cast<Address>(pointer));
  if (found == g_ranges.end() || --found->second.num_lenders > 0) return;
  g_ranges.erase(found);
  g_last = g_ranges.end();
}

bool is_allocated(const void* pointer, int64_t bytes) {
  const Address address = static_cast<Address>(pointer);
  if (g_last != g_ranges.end() && holds(g_last, address, bytes)) return true;
  auto next = g_ranges.upper_bound(address);
  if (next == g_ranges.begin() || !holds(--next, address, bytes)) return false;
  g_last = next;
  return true;
}

void check_device_access(const void* pointer, int64_t bytes, const char* what) {
  if (is_allocated(pointer, bytes)) return;
  fail("%s touches %lld bytes of global memory that no allocation holds", what,
       static_cast<long long>(bytes));
}

void add_global(float* target, const float* values, int num_floats) {
  const int64_t bytes = num_floats * static_cast<int64_t>(sizeof(float));
  if (reinterpret_cast<uintptr_t>(target) % bytes != 0) fail("red.global: address not aligned");
  check_device_access(target, bytes, "red.global.add");
  count(Event::kRedGlobal);
  for (int i = 0; i < num_floats; ++i) target[i] += values[i];
}

}  // namespace drope::emulation

using namespace drope::emulation;

extern "C" void emulation_lend(void* pointer, int64_t bytes) { lend_to_device(pointer, bytes); }
extern "C" void emulation_take_back(void* pointer) { take_back_from_device(pointer); }
