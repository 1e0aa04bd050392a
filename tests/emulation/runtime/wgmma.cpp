#include "wgmma.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "control.h"
#include "machine.h"
#include "wgmma_product.h"

namespace drope::emulation {
namespace {

enum class Step { kFence, kProduct, kCommit, kWait, kRegisters };
constexpr const char* kStepNames[] = {"wgmma.fence", "wgmma.mma_async", "wgmma.commit_group",
                                      "wgmma.wait_group", "setmaxnreg"};

constexpr int kNumWarps = kWarpgroupThreads / kWarpThreads;

struct Entry {
  Step step;
  int number;  // wait_group's or setmaxnreg's operand
  int num_joined = 0;
  WgmmaProduct* product = nullptr;
};

struct Warpgroup {
  std::deque<Entry> queue;  // not yet issued; the first is number num_issued
  uint64_t num_issued = 0;
  std::vector<uint64_t> num_appended;  // per thread
  std::deque<WgmmaProduct*> pending;   // appended and not retired, in order
  std::deque<std::vector<WgmmaProduct*>> groups;
  std::vector<WgmmaProduct*> open;
  bool is_fenced = false;
  uint32_t retired_epoch = 0;
  Clock warp_clocks[kNumWarps];  // what each warp had seen when it appended
};

std::vector<Warpgroup> g_warpgroups;
std::vector<std::unique_ptr<WgmmaProduct>> g_products;  // all ever made
std::vector<WgmmaProduct*> g_free;

WgmmaProduct* new_product(const WgmmaShape& shape) {
  if (g_free.empty()) {
    g_products.push_back(std::make_unique<WgmmaProduct>());
    g_free.push_back(g_products.back().get());
  }
  WgmmaProduct* product = g_free.back();
  g_free.pop_back();
  product->shape = shape;
  product->num_joined = 0;
  product->is_done = false;
  std::memset(product->has_joined, 0, sizeof(product->has_joined));
  std::memset(product->is_poisoned, 0, sizeof(product->is_poisoned));
  return product;
}

// In-flight accumulators are poisoned by the first pending product that uses them; later ones
// continue from its result.
void poison_unclaimed(Warpgroup& group, int thread) {
  if (completion() == Completion::kAtIssue) return;
  for (size_t i = 0; i < group.pending.size(); ++i) {
    WgmmaProduct& product = *group.pending[i];
    if (product.is_done || !product.has_joined[thread] || product.is_poisoned[thread]) continue;
    bool is_first = true;
    for (size_t j = 0; j < i; ++j) {
      const WgmmaProduct& earlier = *group.pending[j];
      is_first &= earlier.is_done || earlier.d[thread][0] != product.d[thread][0];
    }
    if (is_first) product.poison_accumulators(thread);
  }
}

// The unit works in order: everything up to this product.
void execute_until(Warpgroup& group, int warpgroup, const WgmmaProduct* last) {
  const int agent = warpgroup_agent(warpgroup);
  for (WgmmaProduct* product : group.pending) {
    if (!product->is_done) {
      for (Clock& clock : group.warp_clocks) clock[agent] = product->epoch;
      product->execute(agent, group.warp_clocks);
    }
    if (product == last) break;
  }
}

void issue_product(Warpgroup& group, int warpgroup, WgmmaProduct* product) {
  count(Event::kWgmma);
  if (!group.is_fenced) fail("wgmma without wgmma.fence since the last wgmma.wait_group");
  product->epoch = static_cast<uint32_t>(group.num_issued + 1);
  group.open.push_back(product);
  if (happens_now()) execute_until(group, warpgroup, product);
}

void extend_in_flight(Thread& thread, const AddressRange& span) {
  AddressRange& all = thread.in_flight;
  if (all.bytes == 0) {
    all = span;
    return;
  }
  const uintptr_t end = std::max(all.begin + all.bytes, span.begin + span.bytes);
  all.begin = std::min(all.begin, span.begin);
  all.bytes = end - all.begin;
}

void narrow_in_flight(const Warpgroup& group, int warpgroup) {
  for (int place = 0; place < kWarpgroupThreads; ++place) {
    Thread& thread = block_threads()[warpgroup * kWarpgroupThreads + place];
    thread.in_flight = {};
    for (const WgmmaProduct* product : group.pending) {
      if (product->has_joined[place]) extend_in_flight(thread, product->span[place]);
    }
  }
}

void retire_groups(Warpgroup& group, int warpgroup, int num_pending) {
  while (static_cast<int>(group.groups.size()) > num_pending) {
    for (WgmmaProduct* product : group.groups.front()) {
      execute_until(group, warpgroup, product);
      group.retired_epoch = product->epoch;
      group.pending.pop_front();
      g_free.push_back(product);
      group.is_fenced = false;  // its accumulators are registers again
    }
    group.groups.pop_front();
  }
  narrow_in_flight(group, warpgroup);
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) poison_unclaimed(group, thread);
}

void issue(Warpgroup& group, int warpgroup, const Entry& entry) {
  switch (entry.step) {
    case Step::kFence:
      group.is_fenced = true;
      break;
    case Step::kProduct:
      issue_product(group, warpgroup, entry.product);
      break;
    case Step::kCommit:
      group.groups.push_back(group.open);
      group.open.clear();
      break;
    case Step::kWait:
      retire_groups(group, warpgroup, entry.number);
      break;
    case Step::kRegisters:  // every thread has executed it: that is all there is to see
      break;
  }
}

// The thread's next entry of its warpgroup's queue; the first thread to come makes it.
Entry& next_entry(Step step, int number) {
  const Thread& thread = current_thread();
  Warpgroup& group = g_warpgroups[thread.warpgroup];
  const size_t place = group.num_appended[thread.id % kWarpgroupThreads]++ - group.num_issued;
  if (place == group.queue.size()) group.queue.push_back({step, number});
  Entry& entry = group.queue[place];
  if (entry.step != step || entry.number != number) {
    fail("divergent warpgroup %d: this thread executes %s %d, others %s %d", thread.warpgroup,
         kStepNames[static_cast<int>(step)], number, kStepNames[static_cast<int>(entry.step)],
         entry.number);
  }
  join(group.warp_clocks[thread.warp % kNumWarps], thread.clock);
  return entry;
}

// Issues the entry when this thread was the last to append it.
void joined(Entry& entry) {
  const int warpgroup = current_thread().warpgroup;
  Warpgroup& group = g_warpgroups[warpgroup];
  if (++entry.num_joined < kWarpgroupThreads) return;
  const Entry complete = entry;
  issue(group, warpgroup, complete);
  group.queue.pop_front();
  ++group.num_issued;
}

void wait_until_issued() {
  const Thread& thread = current_thread();
  Warpgroup& group = g_warpgroups[thread.warpgroup];
  const uint64_t mine = group.num_appended[thread.id % kWarpgroupThreads];
  while (group.num_issued < mine) {
    const uint64_t seen = group.num_issued;
    wait_while(group.num_issued, seen,
               {"the rest of warpgroup", " %lld to execute wgmma.wait_group", {thread.warpgroup}});
  }
}

}  // namespace

bool WgmmaShape::operator==(const WgmmaShape& other) const {
  return n == other.n && type == other.type && a_in_registers == other.a_in_registers &&
         accumulates == other.accumulates && a_is_mn_major == other.a_is_mn_major &&
         b_is_mn_major == other.b_is_mn_major && sign_a == other.sign_a && sign_b == other.sign_b &&
         desc_a == other.desc_a && desc_b == other.desc_b;
}

void begin_wgmma() {
  const size_t num_threads = block_threads().size();
  g_warpgroups.assign((num_threads + kWarpgroupThreads - 1) / kWarpgroupThreads, Warpgroup());
  g_free.clear();
  for (auto& product : g_products) g_free.push_back(product.get());
  for (Warpgroup& group : g_warpgroups) {
    group.num_appended.assign(kWarpgroupThreads, 0);
    for (Clock& clock : group.warp_clocks) clock.assign(num_agents(), 0);
  }
}

void wgmma_fence() { joined(next_entry(Step::kFence, 0)); }

void wgmma_mma(const WgmmaShape& shape, float* const* d, const uint32_t* a) {
  if (shape.n < 8 || shape.n > 256 || shape.n % 8 != 0) fail("wgmma: n = %d", shape.n);
  Entry& entry = next_entry(Step::kProduct, shape.n);
  const Thread& thread = current_thread();
  Warpgroup& group = g_warpgroups[thread.warpgroup];
  if (!entry.product) {
    entry.product = new_product(shape);
    group.pending.push_back(entry.product);
  }
  if (!(entry.product->shape == shape)) {
    fail("wgmma: descriptors or scale-d differ inside warpgroup %d", thread.warpgroup);
  }
  const int place = thread.id % kWarpgroupThreads;
  entry.product->join(place, d, a);
  extend_in_flight(current_thread(), entry.product->span[place]);
  poison_unclaimed(group, place);
  joined(entry);
}

void wgmma_commit_group() { joined(next_entry(Step::kCommit, 0)); }

void wgmma_wait_group(int num_pending) {
  joined(next_entry(Step::kWait, num_pending));
  wait_until_issued();
  Thread& thread = current_thread();
  const int agent = warpgroup_agent(thread.warpgroup);
  Clock& clock = changing_clock(thread);
  clock[agent] = std::max(clock[agent], g_warpgroups[thread.warpgroup].retired_epoch);
}

void set_max_registers(int num_registers) {
  if (num_registers < 24 || num_registers > 256 || num_registers % 8 != 0) {
    fail("setmaxnreg %d", num_registers);
  }
  joined(next_entry(Step::kRegisters, num_registers));
}

void check_register_access(const void* address, const char* access) {
  const Thread& thread = current_thread();
  for (const WgmmaProduct* product : g_warpgroups[thread.warpgroup].pending) {
    const int place = thread.id % kWarpgroupThreads;
    if (!product->has_joined[place] || !product->span[place].holds(address, 1)) continue;
    for (int i = 0; i < product->num_accumulators(); ++i) {
      if (product->d[place][i] != address) continue;
      fail("accumulator %d is %s while its wgmma is in flight", i, access);
    }
  }
}

void end_wgmma() {
  for (size_t i = 0; i < g_warpgroups.size(); ++i) {
    const Warpgroup& group = g_warpgroups[i];
    if (!group.queue.empty()) {
      fail("warpgroup %zu ended while only %d of its threads had executed %s", i,
           group.queue.front().num_joined, kStepNames[static_cast<int>(group.queue.front().step)]);
    }
    if (!group.pending.empty()) fail("warpgroup %zu ended with wgmma that it did not wait for", i);
  }
}

}  // namespace drope::emulation
