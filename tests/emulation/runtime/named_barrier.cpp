#include "named_barrier.h"

#include "control.h"
#include "machine.h"

namespace drope::emulation {
namespace {

constexpr int kNumBarriers = 16;

struct NamedBarrier {
  int num_arrived = 0, num_threads = 0;
  uint64_t generation = 0;
  Clock arriving, completed;
};

NamedBarrier g_barriers[kNumBarriers];

NamedBarrier& arrive(int barrier, int num_threads) {
  if (barrier < 0 || barrier >= kNumBarriers) fail("bar: barrier %d", barrier);
  if (num_threads <= 0 || num_threads % kWarpThreads != 0) {
    fail("bar: %d threads at barrier %d, not a multiple of %d", num_threads, barrier, kWarpThreads);
  }
  NamedBarrier& one = g_barriers[barrier];
  if (one.num_arrived > 0 && one.num_threads != num_threads) {
    fail("bar: barrier %d is used with %d and with %d threads", barrier, one.num_threads,
         num_threads);
  }
  one.num_threads = num_threads;
  release_to(one.arriving);
  if (++one.num_arrived == num_threads) {
    one.num_arrived = 0;
    one.completed = one.arriving;
    one.arriving.assign(num_agents(), 0);
    ++one.generation;
  }
  return one;
}

}  // namespace

void begin_named_barriers() {
  for (NamedBarrier& one : g_barriers) {
    one = NamedBarrier();
    one.arriving.assign(num_agents(), 0);
  }
}

void bar_arrive(int barrier, int num_threads) { arrive(barrier, num_threads); }

void bar_sync(int barrier, int num_threads) {
  count(Event::kBarSync);
  const uint64_t generation =
      barrier >= 0 && barrier < kNumBarriers ? g_barriers[barrier].generation : 0;
  NamedBarrier& one = arrive(barrier, num_threads);
  wait_while(one.generation, generation,
             {"bar.sync", " %lld of %lld threads", {barrier, num_threads}});
  acquire_from(one.completed);
}

}  // namespace drope::emulation
