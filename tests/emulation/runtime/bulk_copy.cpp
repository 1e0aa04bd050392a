#include "bulk_copy.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "control.h"
#include "device_memory.h"
#include "machine.h"
#include "mbarrier.h"
#include "shared_memory.h"

namespace drope::emulation {
namespace {

// One piece of a copy: a run of shared memory and its place in global memory, null outside.
struct Piece {
  unsigned char* shared;
  unsigned char* global;
  uint32_t bytes;
};

struct BulkCopy {
  std::vector<Piece> pieces;
  bool is_load = false;
  StoreKind kind = StoreKind::kWrite;
  uint32_t mbarrier = 0, bytes = 0;
  int agent = 0;
  uint32_t epoch = 0;
  Clock clock;                        // what the issuing thread had seen
  std::vector<unsigned char> staged;  // a store's bytes between its reading and its writing
  bool is_read = false, is_complete = false;

  Actor actor() const { return {agent, epoch, &clock, Proxy::kAsync, "a bulk copy"}; }
  void load();
  void read_shared();
  void write_global();
  void complete() {
    if (is_load) {
      load();
    } else {
      write_global();
    }
  }
};

using CopyPtr = std::shared_ptr<BulkCopy>;
using Group = std::vector<CopyPtr>;

struct Groups {
  Group open;
  std::deque<Group> committed;
};

std::vector<Groups> g_groups;  // per thread
std::vector<CopyPtr> g_pending;
std::vector<uint32_t> g_epochs;  // per bulk agent
uint64_t g_num_copies = 0;

void BulkCopy::load() {
  if (is_complete) return;
  is_complete = true;
  for (const Piece& piece : pieces) {
    if (piece.global) {
      std::memcpy(piece.shared, piece.global, piece.bytes);
    } else {
      std::memset(piece.shared, 0, piece.bytes);
    }
  }
  Clock done = clock;
  done[agent] = std::max(done[agent], epoch);
  complete_tx(mbarrier, bytes, done);
}

void BulkCopy::read_shared() {
  if (is_read) return;
  is_read = true;
  for (const Piece& piece : pieces) {
    note_read(piece.shared, piece.bytes, actor());
    staged.insert(staged.end(), piece.shared, piece.shared + piece.bytes);
  }
}

template <typename Value, typename Add>
void add_elements(unsigned char* global, const unsigned char* values, uint32_t bytes, Add add) {
  for (uint32_t i = 0; i < bytes; i += sizeof(Value)) {
    Value sum, value;
    std::memcpy(&sum, global + i, sizeof(Value));
    std::memcpy(&value, values + i, sizeof(Value));
    sum = add(sum, value);
    std::memcpy(global + i, &sum, sizeof(Value));
  }
}

void write_piece(unsigned char* global, const unsigned char* values, uint32_t bytes,
                 StoreKind kind) {
  const auto add16 = [](ElementType type) {
    return [type](uint16_t a, uint16_t b) {
      return from_float(to_float(a, type) + to_float(b, type), type);
    };
  };
  switch (kind) {
    case StoreKind::kWrite:
      std::memcpy(global, values, bytes);
      return;
    case StoreKind::kAddFloat32:
      return add_elements<float>(global, values, bytes, [](float a, float b) { return a + b; });
    case StoreKind::kAddFloat16:
      return add_elements<uint16_t>(global, values, bytes, add16(ElementType::kFloat16));
    case StoreKind::kAddBFloat16:
      return add_elements<uint16_t>(global, values, bytes, add16(ElementType::kBFloat16));
  }
}

void BulkCopy::write_global() {
  if (is_complete) return;
  read_shared();
  is_complete = true;
  const unsigned char* values = staged.data();
  for (const Piece& piece : pieces) {
    if (piece.global) write_piece(piece.global, values, piece.bytes, kind);
    values += piece.bytes;
  }
}

CopyPtr new_copy(uint32_t bytes) {
  auto copy = std::make_shared<BulkCopy>();
  copy->bytes = bytes;
  copy->agent = bulk_agent(g_num_copies);
  copy->epoch = ++g_epochs[g_num_copies % kNumBulkAgents];
  copy->clock = current_thread().clock;
  ++g_num_copies;
  return copy;
}

void issue_load(const CopyPtr& copy, uint32_t mbarrier) {
  check_mbarrier_for_copy(mbarrier);
  copy->is_load = true;
  copy->mbarrier = mbarrier;
  const bool is_now = completion() == Completion::kAtIssue;
  for (const Piece& piece : copy->pieces) {
    note_write(piece.shared, piece.bytes, copy->actor());
    if (!is_now) poison(piece.shared, piece.bytes);
  }
  if (is_now) {
    copy->complete();
  } else {
    g_pending.push_back(copy);
  }
}

void issue_store(const CopyPtr& copy, StoreKind kind) {
  copy->kind = kind;
  g_groups[current_thread().id].open.push_back(copy);
  if (completion() == Completion::kAtIssue) {
    copy->complete();
  } else {
    g_pending.push_back(copy);
  }
}

void check_linear(const void* global, uint32_t bytes, const char* what) {
  if (bytes % 16 != 0) fail("%s: %u bytes, not a multiple of 16", what, bytes);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("%s: the global address is not aligned to 16 bytes", what);
  }
  check_device_access(global, bytes, what);
}

void add_piece(std::vector<Piece>& pieces, const Piece& next) {
  Piece* last = pieces.empty() ? nullptr : &pieces.back();
  const bool is_neighbour =
      last && last->shared + last->bytes == next.shared &&
      (next.global ? last->global && last->global + last->bytes == next.global : !last->global);
  if (is_neighbour) {
    last->bytes += next.bytes;
  } else {
    pieces.push_back(next);
  }
}

// 16 bytes from element `index` of the box on; a tensor may end within.
void add_run(std::vector<Piece>& pieces, const TensorMap& map, const int* start, uint32_t index,
             unsigned char* shared) {
  const uint32_t size = map.element_bytes, num_elements = 16 / size;
  unsigned char* first = map.global(start, index);
  if (first && map.global(start, index + num_elements - 1)) {
    add_piece(pieces, {shared, first, 16});
    return;
  }
  for (uint32_t i = 0; i < num_elements; ++i) {
    add_piece(pieces, {shared + i * size, map.global(start, index + i), size});
  }
}

// A box in runs of 16 bytes, which no swizzle tears apart, neighbours joined.
CopyPtr tensor_copy(const TensorMap& map, uint32_t address, const int* start, int rank) {
  const uint32_t bytes = map.box_bytes();
  if (rank != map.rank) fail("tensor copy: %d coordinates for a map of rank %d", rank, map.rank);
  unsigned char* target = shared_bytes(address, bytes, 128, "tensor copy");
  if (map.swizzle > 0 && address % (128u << map.swizzle) != 0) {
    fail("tensor copy: 0x%x is not aligned to eight spans of its swizzle", address);
  }
  CopyPtr copy = new_copy(bytes);
  for (uint32_t i = 0; i < bytes; i += 16) {
    unsigned char* shared = target + (swizzled(address + i, map.swizzle) - address);
    add_run(copy->pieces, map, start, i / map.element_bytes, shared);
  }
  return copy;
}

StoreKind add_kind(const TensorMap& map) {
  switch (map.type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return StoreKind::kAddFloat32;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      return StoreKind::kAddFloat16;
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return StoreKind::kAddBFloat16;
    default:
      fail("tensor reduction: element type %d is not emulated", map.type);
  }
}

void deliver(size_t index) {
  const CopyPtr copy = g_pending[index];
  g_pending.erase(g_pending.begin() + static_cast<std::ptrdiff_t>(index));
  copy->complete();
}

}  // namespace

void begin_bulk_copies() {
  g_groups.assign(block_threads().size(), Groups());
  g_pending.clear();
  g_epochs.assign(kNumBulkAgents, 0);
  g_num_copies = 0;
}

void bulk_load(uint32_t address, const void* global, uint32_t bytes, uint32_t mbarrier) {
  count(Event::kBulkLoad);
  check_linear(global, bytes, "cp.async.bulk");
  const CopyPtr copy = new_copy(bytes);
  auto* source = static_cast<unsigned char*>(const_cast<void*>(global));
  copy->pieces.push_back({shared_bytes(address, bytes, 16, "cp.async.bulk"), source, bytes});
  issue_load(copy, mbarrier);
}

void bulk_store(void* global, uint32_t address, uint32_t bytes, StoreKind kind) {
  count(Event::kBulkStore);
  check_linear(global, bytes, "cp.async.bulk");
  const CopyPtr copy = new_copy(bytes);
  copy->pieces.push_back({shared_bytes(address, bytes, 16, "cp.async.bulk"),
                          static_cast<unsigned char*>(global), bytes});
  issue_store(copy, kind);
}

void tensor_load(uint32_t address, const void* map, const int* start, int rank, uint32_t mbarrier) {
  count(Event::kTensorLoad);
  issue_load(tensor_copy(as_tensor_map(map), address, start, rank), mbarrier);
}

void tensor_store(const void* map, uint32_t address, const int* start, int rank, bool is_add) {
  count(Event::kTensorStore);
  const TensorMap& encoded = as_tensor_map(map);
  const StoreKind kind = is_add ? add_kind(encoded) : StoreKind::kWrite;
  issue_store(tensor_copy(encoded, address, start, rank), kind);
}

void bulk_commit_group() {
  Groups& mine = g_groups[current_thread().id];
  mine.committed.push_back(std::move(mine.open));
  mine.open.clear();
}

void bulk_wait_group(int num_pending, bool is_read) {
  Thread& thread = current_thread();
  std::deque<Group>& committed = g_groups[thread.id].committed;
  const int num_due = static_cast<int>(committed.size()) - num_pending;
  for (int i = 0; i < num_due; ++i) {
    for (const CopyPtr& copy : committed[i]) {
      if (is_read) {
        copy->read_shared();
      } else {
        copy->complete();
      }
      Clock& clock = changing_clock(thread);
      clock[copy->agent] = std::max(clock[copy->agent], copy->epoch);
    }
  }
  if (!is_read && num_due > 0) committed.erase(committed.begin(), committed.begin() + num_due);
}

bool deliver_oldest_copy() {
  if (g_pending.empty()) return false;
  deliver(0);
  return true;
}

bool deliver_random_copy() {
  if (g_pending.empty()) return false;
  deliver(random_below(static_cast<uint32_t>(g_pending.size())));
  return true;
}

void end_bulk_copies() {
  for (const CopyPtr& copy : g_pending) {
    if (copy->is_load && !copy->is_complete) fail("the block ended with a bulk load in flight");
  }
  for (size_t thread = 0; thread < g_groups.size(); ++thread) {
    const Groups& groups = g_groups[thread];
    if (!groups.open.empty() || !groups.committed.empty()) {
      fail("thread %zu ended with bulk stores that it did not wait for", thread);
    }
  }
}

}  // namespace drope::emulation
