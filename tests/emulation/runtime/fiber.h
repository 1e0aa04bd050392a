// Stacks and the switch between them (x86-64, System V ABI).
#pragma once

#include "machine.h"

namespace drope::emulation {

// A stack pointer that, switched to, calls entry() on stack number `index`. Stacks are kept.
void* new_stack_pointer(int index, void (*entry)());

AddressRange stack_range(int index);

// Saves the caller's registers and stack pointer, goes on where `load` was saved.
void switch_stack(void** save, void* load);

}  // namespace drope::emulation
