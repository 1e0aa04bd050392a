#include "mbarrier.h"

#include <unordered_map>

#include "control.h"
#include "shared_memory.h"

namespace drope::emulation {
namespace {

constexpr uint32_t kMaxCount = (1 << 20) - 1;
constexpr int64_t kMaxTx = (1 << 20) - 1;
constexpr int kTestsBeforePoll = 64;  // a loop over test_wait must let others go on

struct Mbarrier {
  uint64_t phase = 0;
  uint32_t count = 0, pending = 0;
  int64_t tx = 0;
  int initialiser = 0;
  uint32_t init_epoch = 0;
  bool is_fenced = false;  // fence.mbarrier_init by the initialiser
  int failed_tests = 0;
  Clock arriving, completed;
};

std::unordered_map<uint32_t, Mbarrier> g_barriers;

Mbarrier& find(uint32_t address, const char* what) {
  shared_bytes(address, 8, 8, what);
  const auto found = g_barriers.find(address);
  if (found == g_barriers.end()) fail("%s: no mbarrier was initialised at 0x%x", what, address);
  return found->second;
}

// For a thread: the initialisation must be ordered before it.
Mbarrier& find_visible(uint32_t address, const char* what) {
  Mbarrier& barrier = find(address, what);
  if (barrier.init_epoch > current_thread().clock[barrier.initialiser]) {
    fail("race: %s at 0x%x, initialised by thread %d with nothing between that orders them", what,
         address, barrier.initialiser);
  }
  return barrier;
}

void add_tx(Mbarrier& barrier, int64_t bytes, uint32_t address) {
  barrier.tx += bytes;
  if (barrier.tx > kMaxTx || barrier.tx < -kMaxTx) {
    fail("mbarrier at 0x%x: transaction count %lld is out of range", address,
         static_cast<long long>(barrier.tx));
  }
}

void complete_phase_if_due(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.tx != 0) return;
  barrier.pending = barrier.count;
  barrier.completed = barrier.arriving;
  barrier.arriving.assign(num_agents(), 0);
  ++barrier.phase;
}

void arrive(Mbarrier& barrier, uint32_t address) {
  count(Event::kMbarrierArrive);
  if (barrier.pending == 0) {
    fail("mbarrier at 0x%x: more arrivals than its count of %u in one phase", address,
         barrier.count);
  }
  release_to(barrier.arriving);
  --barrier.pending;
  complete_phase_if_due(barrier);
}

bool is_complete(Mbarrier& barrier, uint32_t parity) {
  if (barrier.phase % 2 == parity) return false;
  if (barrier.phase > 0) acquire_from(barrier.completed);
  return true;
}

void check_parity(uint32_t parity) {
  if (parity > 1) fail("mbarrier: parity %u", parity);
}

}  // namespace

void begin_mbarriers() { g_barriers.clear(); }

void mbarrier_init(uint32_t address, uint32_t count) {
  unsigned char* bytes = shared_bytes(address, 8, 8, "mbarrier.init");
  if (count < 1 || count > kMaxCount) fail("mbarrier.init: count %u", count);
  if (g_barriers.count(address)) fail("mbarrier.init: 0x%x holds a live mbarrier", address);
  note_write(bytes, 8, current_actor("mbarrier.init"));
  mark_barrier(bytes, true);
  Mbarrier& barrier = g_barriers[address];
  barrier.count = barrier.pending = count;
  barrier.initialiser = current_thread().id;
  barrier.init_epoch = current_thread().epoch();
  barrier.arriving.assign(num_agents(), 0);
}

void mbarrier_invalidate(uint32_t address) {
  find_visible(address, "mbarrier.inval");
  mark_barrier(shared_bytes(address, 8, 8, "mbarrier.inval"), false);
  g_barriers.erase(address);
}

void mbarrier_expect_tx(uint32_t address, uint32_t bytes) {
  add_tx(find_visible(address, "mbarrier.expect_tx"), bytes, address);
}

void mbarrier_arrive(uint32_t address) {
  arrive(find_visible(address, "mbarrier.arrive"), address);
}

void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = find_visible(address, "mbarrier.arrive.expect_tx");
  add_tx(barrier, bytes, address);
  arrive(barrier, address);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  check_parity(parity);
  Mbarrier& barrier = find_visible(address, "mbarrier.try_wait");
  if (barrier.phase % 2 == parity) {
    poll_while(barrier.phase, barrier.phase,
               {"the mbarrier",
                " at 0x%llx, parity %lld (%lld arrivals and %lld bytes pending)",
                {address, parity, barrier.pending, barrier.tx}});
  }
  const bool complete = is_complete(barrier, parity);
  if (complete) count(Event::kMbarrierWait);
  return complete;
}

bool mbarrier_test_wait(uint32_t address, uint32_t parity) {
  check_parity(parity);
  Mbarrier& barrier = find_visible(address, "mbarrier.test_wait");
  if (is_complete(barrier, parity)) {
    barrier.failed_tests = 0;
    return true;
  }
  if (++barrier.failed_tests % kTestsBeforePoll == 0) return mbarrier_try_wait(address, parity);
  return false;
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : g_barriers) {
    if (barrier.initialiser == current_thread().id) barrier.is_fenced = true;
  }
}

void check_mbarrier_for_copy(uint32_t address) {
  if (!find_visible(address, "bulk copy").is_fenced) {
    fail("proxy: a bulk copy uses the mbarrier at 0x%x, initialised without fence.mbarrier_init",
         address);
  }
}

void complete_tx(uint32_t address, uint32_t bytes, const Clock& clock) {
  Mbarrier& barrier = find(address, "complete_tx");
  join(barrier.arriving, clock);
  add_tx(barrier, -static_cast<int64_t>(bytes), address);
  complete_phase_if_due(barrier);
}

}  // namespace drope::emulation
