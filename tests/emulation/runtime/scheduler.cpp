#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "bulk_copy.h"
#include "control.h"
#include "cp_async.h"
#include "fiber.h"
#include "launch.h"
#include "machine.h"
#include "mbarrier.h"
#include "named_barrier.h"
#include "shared_memory.h"
#include "warp.h"
#include "wgmma.h"

namespace drope::emulation {
namespace {

constexpr int kMaxIdlePolls = 16;  // rounds in which polls time out and nothing else happens
constexpr unsigned kMaxBlockThreads = 1024;

struct LaunchFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::vector<Thread> g_threads;
Thread* g_current = nullptr;
void* g_scheduler_stack = nullptr;
void (*g_body)(void*) = nullptr;
void* g_argument = nullptr;
std::string g_failure;  // of a thread; the scheduler throws it
uint64_t g_random_state = 1;
std::unordered_map<const void*, unsigned> g_allowed_shared_bytes;
bool g_launch_failed = false;

void to_scheduler() { switch_stack(&g_current->stack_pointer, g_scheduler_stack); }

void thread_entry() {
  g_body(g_argument);
  g_current->done = true;
  to_scheduler();
}

bool is_ready(const Thread& thread) {
  if (thread.done) return false;
  return !thread.waits_on || thread.timed_out || *thread.waits_on != thread.waits_while;
}

// Runs the thread until it waits or ends.
void resume(Thread& thread) {
  thread.waits_on = nullptr;
  g_current = &thread;
  switch_stack(&g_scheduler_stack, thread.stack_pointer);
  g_current = nullptr;
  if (!g_failure.empty()) throw LaunchFailure(g_failure);
}

// One round over the threads. Progress: what a thread waited for has come.
struct Round {
  bool any_ran = false, any_progress = false;
};

Round run_ready_threads() {
  Round round;
  const int n = static_cast<int>(g_threads.size());
  const bool is_random = completion() == Completion::kRandom;
  const int first = is_random ? random_below(n) : 0;
  for (int k = 0; k < n; ++k) {
    Thread& thread = g_threads[(first + k) % n];
    if (!is_ready(thread)) continue;
    round.any_ran = true;
    if (!thread.timed_out && !thread.was_preempted) round.any_progress = true;
    resume(thread);
    if (!is_random) continue;
    if (random_below(64) == 0) deliver_random_copy();
    if (random_below(8) == 0) break;  // go on with another thread
  }
  return round;
}

bool time_out_polls() {
  bool any = false;
  for (Thread& thread : g_threads) {
    if (!thread.done && thread.is_poll) any = thread.timed_out = true;
  }
  return any;
}

[[noreturn]] void report_deadlock() {
  std::string message = "deadlock:";
  const int n = static_cast<int>(g_threads.size());
  for (int i = 0; i < n;) {
    int end = i + 1;
    const Thread& first = g_threads[i];
    while (end < n && g_threads[end].done == first.done &&
           std::strcmp(g_threads[end].waits_for, first.waits_for) == 0) {
      ++end;
    }
    if (!first.done) {
      message += " threads " + std::to_string(i) + "-" + std::to_string(end - 1) + " wait for " +
                 first.waits_for + ";";
    }
    i = end;
  }
  const Coordinates& where = g_threads[0].coordinates;
  fail("%s block (%u, %u, %u)", message.c_str(), where.block.x, where.block.y, where.block.z);
}

void begin_block(const Coordinates& coordinates, unsigned shared_bytes) {
  const int n = static_cast<int>(coordinates.block_size.x);
  g_threads.assign(n, Thread());
  for (int i = 0; i < n; ++i) {
    Thread& thread = g_threads[i];
    thread.id = i;
    thread.lane = i % kWarpThreads;
    thread.warp = i / kWarpThreads;
    thread.warpgroup = i / kWarpgroupThreads;
    thread.coordinates = coordinates;
    thread.coordinates.thread = dim3(i, 0, 0);
    thread.stack_pointer = new_stack_pointer(i, thread_entry);
    thread.clock.assign(num_agents(), 0);
    thread.clock[i] = 1;
  }
  begin_shared_memory(shared_bytes);
  begin_named_barriers();
  begin_mbarriers();
  begin_warps();
  begin_cp_async();
  begin_bulk_copies();
  begin_wgmma();
}

void run_block(const Coordinates& coordinates, unsigned shared_bytes) {
  begin_block(coordinates, shared_bytes);
  int idle_polls = 0;
  while (std::any_of(g_threads.begin(), g_threads.end(), [](auto& t) { return !t.done; })) {
    const Round round = run_ready_threads();
    if (round.any_progress) idle_polls = 0;
    if (round.any_ran) continue;
    if (deliver_oldest_copy()) continue;
    if (idle_polls++ < kMaxIdlePolls && time_out_polls()) continue;
    report_deadlock();
  }
  end_cp_async();
  end_wgmma();
  end_bulk_copies();
}

void check_shape(const void* kernel, const LaunchShape& shape) {
  const auto allowed = g_allowed_shared_bytes.find(kernel);
  const unsigned limit =
      allowed == g_allowed_shared_bytes.end() ? kDefaultSharedBytes : allowed->second;
  if (shape.shared_bytes > std::max(limit, kDefaultSharedBytes)) {
    fail("%u bytes of shared memory; the kernel may have %u", shape.shared_bytes, limit);
  }
  if (shape.block.y != 1 || shape.block.z != 1) fail("blocks of more dimensions are not emulated");
  if (shape.block.x < 1 || shape.block.x > kMaxBlockThreads) fail("%u threads", shape.block.x);
}

void wait_on(const uint64_t& word, uint64_t value, bool is_poll, const char* format,
             va_list arguments) {
  Thread& thread = current_thread();
  std::vsnprintf(thread.waits_for, sizeof(thread.waits_for), format, arguments);
  thread.waits_on = &word;
  thread.waits_while = value;
  thread.is_poll = is_poll;
  to_scheduler();
  thread.is_poll = thread.timed_out = false;
}

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!g_current) throw LaunchFailure(text);
  const dim3 block = g_current->coordinates.block;
  g_failure = std::string(text) + " (block (" + std::to_string(block.x) + ", " +
              std::to_string(block.y) + ", " + std::to_string(block.z) + "), thread " +
              std::to_string(g_current->id) + ")";
  to_scheduler();  // for good: the fiber is abandoned where it stands
  __builtin_unreachable();
}

bool in_kernel() { return g_current != nullptr; }

Thread& current_thread() {
  if (!g_current) fail("device code outside a kernel");
  return *g_current;
}

std::vector<Thread>& block_threads() { return g_threads; }

int warp_size(int warp) {
  return std::min<int>(kWarpThreads, g_threads.size() - warp * kWarpThreads);
}

bool happens_now() {
  if (completion() == Completion::kRandom) return random_below(2) == 0;
  return completion() == Completion::kAtIssue;
}

uint32_t random_below(uint32_t limit) {  // xorshift64
  g_random_state ^= g_random_state << 13;
  g_random_state ^= g_random_state >> 7;
  g_random_state ^= g_random_state << 17;
  return static_cast<uint32_t>((g_random_state >> 16) % limit);
}

void preemption_point() {
  if (completion() != Completion::kRandom || random_below(64) != 0) return;
  Thread& thread = *g_current;
  thread.was_preempted = true;
  to_scheduler();
  thread.was_preempted = false;
}

void wait_while(const uint64_t& word, uint64_t value, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  while (word == value) wait_on(word, value, false, format, arguments);
  va_end(arguments);
}

void poll_while(const uint64_t& word, uint64_t value, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (word == value) wait_on(word, value, true, format, arguments);
  va_end(arguments);
}

int num_agents() { return bulk_agent(0) + kNumBulkAgents; }

int warpgroup_agent(int warpgroup) { return static_cast<int>(g_threads.size()) + warpgroup; }

int bulk_agent(uint64_t operation) {
  const int num_warpgroups =
      (static_cast<int>(g_threads.size()) + kWarpgroupThreads - 1) / kWarpgroupThreads;
  return warpgroup_agent(num_warpgroups) + static_cast<int>(operation % kNumBulkAgents);
}

void join(Clock& into, const Clock& from) {
  const size_t n = into.size();
  for (size_t i = 0; i < n; ++i) into[i] = std::max(into[i], from[i]);
}

void release_to(Clock& into) {
  Thread& thread = current_thread();
  join(into, thread.clock);
  ++thread.clock[thread.id];
}

void acquire_from(const Clock& from) { join(current_thread().clock, from); }

void run_kernel(const void* kernel, const LaunchShape& shape, void (*body)(void*), void* argument) {
  g_body = body;
  g_argument = argument;
  g_failure.clear();
  g_random_state = seed() * 0x9E3779B97F4A7C15ull + 1;
  Coordinates where{dim3(0, 0, 0), dim3(0, 0, 0), shape.block, shape.grid};
  try {
    check_shape(kernel, shape);
    for (where.block.z = 0; where.block.z < shape.grid.z; ++where.block.z) {
      for (where.block.y = 0; where.block.y < shape.grid.y; ++where.block.y) {
        for (where.block.x = 0; where.block.x < shape.grid.x; ++where.block.x) {
          run_block(where, shape.shared_bytes);
        }
      }
    }
  } catch (const LaunchFailure& failure) {
    g_current = nullptr;
    g_launch_failed = true;
    set_error(failure.what());
  }
}

void allow_shared_bytes(const void* kernel, unsigned bytes) {
  g_allowed_shared_bytes[kernel] = bytes;
}

bool take_launch_error() {
  const bool failed = g_launch_failed;
  g_launch_failed = false;
  return failed;
}

}  // namespace drope::emulation
