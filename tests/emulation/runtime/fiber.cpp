#include "fiber.h"

#include <sys/mman.h>

#include <vector>

// switch_stack.S
extern "C" void drope_emulation_switch(void** save, void* load);

namespace drope::emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4 << 10;
// Stacks start at different cache sets: all threads touch the same depths in turn.
constexpr size_t kColourStep = 13 * 64, kNumColours = 64;
std::vector<unsigned char*> g_stacks;

unsigned char* stack(int index) {
  while (static_cast<int>(g_stacks.size()) <= index) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(memory, kGuardBytes, PROT_NONE);  // an overflow ends the process, not its neighbour
    g_stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return g_stacks[index];
}

}  // namespace

void* new_stack_pointer(int index, void (*entry)()) {
  const size_t colour = index % kNumColours * kColourStep;
  void** top = reinterpret_cast<void**>(stack(index) + kStackBytes - colour);
  *--top = nullptr;  // entry's return address: it never returns, and the ABI wants 8 modulo 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the saved registers
  return top;
}

AddressRange stack_range(int index) {
  return {reinterpret_cast<uintptr_t>(stack(index)), kStackBytes};
}

void switch_stack(void** save, void* load) { drope_emulation_switch(save, load); }

}  // namespace drope::emulation
