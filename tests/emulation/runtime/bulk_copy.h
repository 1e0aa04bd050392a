// PTX ISA, "Bulk copy" and "Tensor copy": TMA. Loads end on an mbarrier, stores in bulk groups.
#pragma once

#include <cstdint>

#include "tensor_map.h"

namespace drope::emulation {

enum class StoreKind { kWrite, kAddFloat32, kAddFloat16, kAddBFloat16 };

void begin_bulk_copies();
void bulk_load(uint32_t address, const void* global, uint32_t bytes, uint32_t mbarrier);
void bulk_store(void* global, uint32_t address, uint32_t bytes, StoreKind kind);
void tensor_load(uint32_t address, const void* map, const int* start, int rank, uint32_t mbarrier);
// Reductions add in the map's type.
void tensor_store(const void* map, uint32_t address, const int* start, int rank, bool is_add);
void bulk_commit_group();
// is_read: shared memory has been read; otherwise global memory has been written too.
void bulk_wait_group(int num_pending, bool is_read);

// For the scheduler. True when there was one.
bool deliver_oldest_copy();
bool deliver_random_copy();
void end_bulk_copies();  // fails when copies are left that nobody waited for

}  // namespace drope::emulation
