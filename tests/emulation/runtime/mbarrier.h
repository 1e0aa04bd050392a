// PTX ISA, "mbarrier". The state lives beside shared memory, whose 8 bytes only mark the place.
#pragma once

#include <cstdint>

#include "machine.h"

namespace drope::emulation {

void begin_mbarriers();
void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_invalidate(uint32_t address);
void mbarrier_expect_tx(uint32_t address, uint32_t bytes);
void mbarrier_arrive(uint32_t address);
void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes);
// May suspend, as the hardware does; false when nothing else could go on meanwhile.
bool mbarrier_try_wait(uint32_t address, uint32_t parity);
bool mbarrier_test_wait(uint32_t address, uint32_t parity);
void fence_mbarrier_init();

// For bulk copies: fails unless the barrier may be used by them; then, later, its bytes.
void check_mbarrier_for_copy(uint32_t address);
void complete_tx(uint32_t address, uint32_t bytes, const Clock& clock);

}  // namespace drope::emulation
