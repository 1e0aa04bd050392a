// The emulated machine: one block at a time, one fiber per CUDA thread, and who happened before
// whom.
#pragma once

#include <cstdint>
#include <vector>

#include "../cuda/dim3.h"

namespace drope::emulation {

// When asynchronous work takes effect: as early as it may, as late as it may, or at random.
enum class Completion : int { kAtIssue = 0, kLatest = 1, kRandom = 2 };

// An agent is whoever touches shared memory on its own time: every thread, the wgmma unit of every
// warpgroup, and kNumBulkAgents takers of bulk copies. A clock holds, for every agent, the newest
// of its epochs that has become visible.
using Clock = std::vector<uint32_t>;

constexpr int kWarpThreads = 32, kWarpgroupThreads = 128;
constexpr int kNumBulkAgents = 32;

// What a thread waits for, in words; printed when there is a deadlock. The format takes the
// numbers.
struct WaitReason {
  const char* what = "";
  const char* format = "";
  long long numbers[4] = {};
};

struct AddressRange {
  uintptr_t begin = 0, bytes = 0;

  bool holds(const void* pointer, uintptr_t size) const {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(pointer) - begin;
    return offset < bytes && size <= bytes - offset;
  }
};

struct Thread {
  int id = 0, lane = 0, warp = 0, warpgroup = 0;
  void* stack_pointer = nullptr;
  const uint64_t* waits_on = nullptr;  // runnable once *waits_on != waits_while
  uint64_t waits_while = 0;
  bool done = false;
  bool is_poll = false;  // the wait may also end without success
  bool timed_out = false;
  bool was_preempted = false;
  AddressRange stack;
  AddressRange in_flight;  // spans the accumulators of its wgmma in flight
  Coordinates coordinates;
  Clock clock;
  WaitReason reason;

  uint32_t epoch() const { return clock[id]; }
};

// Ends the launch with this message; in a kernel the thread's number is added.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

extern Thread* g_running;  // null outside of kernels
[[noreturn]] void fail_outside_kernel();

inline bool in_kernel() { return g_running != nullptr; }
inline Thread& current_thread() {
  if (!g_running) fail_outside_kernel();
  return *g_running;
}
// Neither shared nor device memory, but the running thread's: its stack, its kernel's parameters,
// the program's static data.
bool is_own_memory(const void* pointer, uintptr_t bytes);

std::vector<Thread>& block_threads();
int warp_size(int warp);  // the last warp of a block may be short

Completion completion();
bool happens_now();  // at issue: yes; latest: no; random: a coin
uint32_t random_below(uint32_t limit);
void preemption_point();  // in random mode, now and then, another thread goes on

// Suspends the current thread until word != value.
void wait_while(const uint64_t& word, uint64_t value, const WaitReason& reason);
// As wait_while, but returns as well when nothing else can go on: the caller looks again.
void poll_while(const uint64_t& word, uint64_t value, const WaitReason& reason);

int num_agents();
int warpgroup_agent(int warpgroup);
int bulk_agent(uint64_t operation);
void join(Clock& into, const Clock& from);
// The thread's own clock, to be changed.
Clock& changing_clock(Thread& thread);
// Grows with every change of a clock of the warp's threads.
uint64_t num_clock_changes(int warp);
// What the current thread did before is visible to whoever acquires this clock.
void release_to(Clock& into);
void acquire_from(const Clock& from);

}  // namespace drope::emulation
