// The compiler calls these around every ordinary load and store of a kernel: its -fsanitize=thread
// instrumentation, received by the emulator in place of ThreadSanitizer's own runtime.
#include <cstdint>

#include "device_memory.h"
#include "machine.h"
#include "shared_memory.h"
#include "wgmma.h"

namespace drope::emulation {
namespace {

void check_alignment(const void* pointer, uint32_t size) {
  if (reinterpret_cast<uintptr_t>(pointer) % size != 0 && in_kernel()) {
    fail("an ordinary access of %u bytes is not aligned", size);
  }
}

// Neither shared nor the thread's own: ordinary code may touch its own stack, what the launch gave
// it, and constants of the program; everything else is the device's.
void check_device(const void* pointer, uint32_t size, const char* what) {
  if (!is_own_memory(pointer, size)) check_device_access(pointer, size, what);
}

void read(const void* pointer, uint32_t size) {
  if (!in_kernel()) return;
  if (g_running->stack.holds(pointer, size)) {
    if (g_running->in_flight.holds(pointer, 1)) check_register_access(pointer, "read");
  } else if (is_shared(pointer)) {
    note_read(static_cast<const unsigned char*>(pointer), size, current_actor("an ordinary load"));
  } else {
    check_device(pointer, size, "an ordinary load");
  }
}

void write(const void* pointer, uint32_t size) {
  if (!in_kernel()) return;
  if (g_running->stack.holds(pointer, size)) {
    if (g_running->in_flight.holds(pointer, 1)) check_register_access(pointer, "written");
  } else if (is_shared(pointer)) {
    note_write(static_cast<const unsigned char*>(pointer), size,
               current_actor("an ordinary store"));
  } else {
    check_device(pointer, size, "an ordinary store");
  }
}

template <uint32_t kSize>
void aligned_read(const void* pointer) {
  check_alignment(pointer, kSize);
  read(pointer, kSize);
}

template <uint32_t kSize>
void aligned_write(const void* pointer) {
  check_alignment(pointer, kSize);
  write(pointer, kSize);
}

}  // namespace
}  // namespace drope::emulation

using namespace drope::emulation;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read1(void* p) { aligned_read<1>(p); }
void __tsan_read2(void* p) { aligned_read<2>(p); }
void __tsan_read4(void* p) { aligned_read<4>(p); }
void __tsan_read8(void* p) { aligned_read<8>(p); }
void __tsan_read16(void* p) { aligned_read<16>(p); }
void __tsan_write1(void* p) { aligned_write<1>(p); }
void __tsan_write2(void* p) { aligned_write<2>(p); }
void __tsan_write4(void* p) { aligned_write<4>(p); }
void __tsan_write8(void* p) { aligned_write<8>(p); }
void __tsan_write16(void* p) { aligned_write<16>(p); }
void __tsan_unaligned_read2(void* p) { read(p, 2); }
void __tsan_unaligned_read4(void* p) { read(p, 4); }
void __tsan_unaligned_read8(void* p) { read(p, 8); }
void __tsan_unaligned_read16(void* p) { read(p, 16); }
void __tsan_unaligned_write2(void* p) { write(p, 2); }
void __tsan_unaligned_write4(void* p) { write(p, 4); }
void __tsan_unaligned_write8(void* p) { write(p, 8); }
void __tsan_unaligned_write16(void* p) { write(p, 16); }
void __tsan_volatile_read1(void* p) { aligned_read<1>(p); }
void __tsan_volatile_read2(void* p) { aligned_read<2>(p); }
void __tsan_volatile_read4(void* p) { aligned_read<4>(p); }
void __tsan_volatile_read8(void* p) { aligned_read<8>(p); }
void __tsan_volatile_write1(void* p) { aligned_write<1>(p); }
void __tsan_volatile_write2(void* p) { aligned_write<2>(p); }
void __tsan_volatile_write4(void* p) { aligned_write<4>(p); }
void __tsan_volatile_write8(void* p) { aligned_write<8>(p); }
void __tsan_read_range(void* p, unsigned long size) { read(p, static_cast<uint32_t>(size)); }
void __tsan_write_range(void* p, unsigned long size) { write(p, static_cast<uint32_t>(size)); }
}
