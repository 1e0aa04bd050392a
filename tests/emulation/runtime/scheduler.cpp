#include <link.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "bulk_copy.h"
#include "control.h"
#include "cp_async.h"
#include "device.h"
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
constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;  // cudaError_t
constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

struct LaunchFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::vector<Thread> g_threads;
std::array<uint64_t, kMaxBlockThreads / kWarpThreads> g_clock_changes;
int g_num_agents = 0;
bool g_any_progress = false;  // since the scheduler asked last
void* g_scheduler_stack = nullptr;
KernelCall g_call{};
AddressRange g_parameters;  // of the kernel
AddressRange g_program;     // where the kernel's shared object lies, its static data included
std::string g_failure;      // of a thread; the scheduler throws it
uint64_t g_random_state = 1;
std::unordered_map<const void*, unsigned> g_allowed_shared_bytes;
int g_launch_error = 0;

void to_scheduler() { switch_stack(&g_running->stack_pointer, g_scheduler_stack); }

void thread_entry() {
  g_call.body(g_call.argument);
  g_running->done = true;
  to_scheduler();
}

bool is_ready(const Thread& thread) {
  if (thread.done) return false;
  return !thread.waits_on || thread.timed_out || *thread.waits_on != thread.waits_while;
}

// Runs the thread until it waits or ends.
void resume(Thread& thread) {
  thread.waits_on = nullptr;
  g_running = &thread;
  switch_stack(&g_scheduler_stack, thread.stack_pointer);
  g_running = nullptr;
  if (!g_failure.empty()) throw LaunchFailure(g_failure);
}

// From thread to thread of a warp without the scheduler: a warp exchanges registers all the time.
bool switch_inside_warp() {
  if (completion() == Completion::kRandom) return false;
  Thread& from = *g_running;
  const int size = warp_size(from.warp), first = from.warp * kWarpThreads;
  for (int k = 1; k < size; ++k) {
    Thread& next = g_threads[first + (from.lane + k) % size];
    if (!is_ready(next) || next.timed_out) continue;
    g_any_progress = true;
    next.waits_on = nullptr;
    g_running = &next;
    switch_stack(&from.stack_pointer, next.stack_pointer);
    return true;
  }
  return false;
}

// One round over the threads; whether any ran. Progress: what a thread waited for has come.
bool run_ready_threads() {
  bool any_ran = false;
  const int n = static_cast<int>(g_threads.size());
  const bool is_random = completion() == Completion::kRandom;
  const int first = is_random ? random_below(n) : 0;
  for (int k = 0; k < n; ++k) {
    Thread& thread = g_threads[(first + k) % n];
    if (!is_ready(thread)) continue;
    any_ran = true;
    if (!thread.timed_out && !thread.was_preempted) g_any_progress = true;
    resume(thread);
    if (!is_random) continue;
    if (random_below(64) == 0) deliver_random_copy();
    if (random_below(8) == 0) break;  // go on with another thread
  }
  return any_ran;
}

bool time_out_polls() {
  bool any = false;
  for (Thread& thread : g_threads) {
    if (!thread.done && thread.is_poll) any = thread.timed_out = true;
  }
  return any;
}

std::string in_words(const WaitReason& reason) {
  char text[160];
  const long long* n = reason.numbers;
  std::snprintf(text, sizeof(text), reason.format, n[0], n[1], n[2], n[3]);
  return std::string(reason.what) + text;
}

[[noreturn]] void report_deadlock() {
  std::string message = "deadlock:";
  const int n = static_cast<int>(g_threads.size());
  for (int i = 0; i < n;) {
    const Thread& first = g_threads[i];
    const std::string reason = in_words(first.reason);
    int end = i + 1;
    while (end < n && g_threads[end].done == first.done &&
           in_words(g_threads[end].reason) == reason) {
      ++end;
    }
    if (!first.done) {
      message += " threads " + std::to_string(i) + "-" + std::to_string(end - 1) + " wait for " +
                 reason + ";";
    }
    i = end;
  }
  const Coordinates& where = g_threads[0].coordinates;
  fail("%s block (%u, %u, %u)", message.c_str(), where.block.x, where.block.y, where.block.z);
}

// Memory is kept from block to block.
void begin_thread(Thread& thread, int id, const Coordinates& coordinates) {
  Clock clock = std::move(thread.clock);
  clock.assign(g_num_agents, 0);
  clock[id] = 1;
  thread = Thread();
  thread.id = id;
  thread.lane = id % kWarpThreads;
  thread.warp = id / kWarpThreads;
  thread.warpgroup = id / kWarpgroupThreads;
  thread.coordinates = coordinates;
  thread.coordinates.thread = dim3(id, 0, 0);
  thread.stack_pointer = new_stack_pointer(id, thread_entry);
  thread.stack = stack_range(id);
  thread.clock = std::move(clock);
}

void begin_block(const Coordinates& coordinates, unsigned shared_bytes) {
  const int n = static_cast<int>(coordinates.block_size.x);
  g_threads.resize(n);
  g_num_agents = bulk_agent(0) + kNumBulkAgents;
  g_clock_changes.fill(1);
  for (int i = 0; i < n; ++i) begin_thread(g_threads[i], i, coordinates);
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
    g_any_progress = false;
    const bool any_ran = run_ready_threads();
    if (g_any_progress) idle_polls = 0;
    if (any_ran) continue;
    if (deliver_oldest_copy()) continue;
    if (idle_polls++ < kMaxIdlePolls && time_out_polls()) continue;
    report_deadlock();
  }
  end_cp_async();
  end_wgmma();
  end_bulk_copies();
}

AddressRange object_range(const void* symbol) {
  struct Search {
    uintptr_t symbol;
    AddressRange found;
  } search{reinterpret_cast<uintptr_t>(symbol), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* given) {
        auto& search = *static_cast<Search*>(given);
        uintptr_t end = 0;
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const auto& part = object->dlpi_phdr[i];
          if (part.p_type == PT_LOAD) end = std::max<uintptr_t>(end, part.p_vaddr + part.p_memsz);
        }
        if (search.symbol - object->dlpi_addr >= end) return 0;
        search.found = {object->dlpi_addr, end};
        return 1;
      },
      &search);
  return search.found;
}

// What CUDA refuses before anything runs.
int launch_refusal(const void* kernel, const LaunchShape& shape) {
  const auto allowed = g_allowed_shared_bytes.find(kernel);
  const unsigned limit =
      std::max(allowed == g_allowed_shared_bytes.end() ? 0 : allowed->second, kDefaultSharedBytes);
  if (shape.shared_bytes > std::min(limit, device().shared_bytes)) return kInvalidValue;
  const dim3 &grid = shape.grid, &block = shape.block;
  const bool is_grid = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= kMaxGridX &&
                       grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ;
  const uint64_t num_threads = uint64_t{block.x} * block.y * block.z;
  if (!is_grid || num_threads < 1 || num_threads > kMaxBlockThreads) return kInvalidConfiguration;
  return 0;
}

void wait_on(const uint64_t& word, uint64_t value, bool is_poll, const WaitReason& reason) {
  Thread& thread = current_thread();
  thread.reason = reason;
  thread.waits_on = &word;
  thread.waits_while = value;
  thread.is_poll = is_poll;
  if (!switch_inside_warp()) to_scheduler();
  thread.is_poll = thread.timed_out = false;
}

}  // namespace

Thread* g_running = nullptr;

void fail_outside_kernel() { fail("device code outside a kernel"); }

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!g_running) throw LaunchFailure(text);
  const dim3 block = g_running->coordinates.block;
  g_failure = std::string(text) + " (block (" + std::to_string(block.x) + ", " +
              std::to_string(block.y) + ", " + std::to_string(block.z) + "), thread " +
              std::to_string(g_running->id) + ")";
  to_scheduler();  // for good: the fiber is abandoned where it stands
  __builtin_unreachable();
}

bool is_own_memory(const void* pointer, uintptr_t bytes) {
  return g_running->stack.holds(pointer, bytes) || g_parameters.holds(pointer, bytes) ||
         g_program.holds(pointer, bytes);
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
  Thread& thread = *g_running;
  thread.was_preempted = true;
  to_scheduler();
  thread.was_preempted = false;
}

void wait_while(const uint64_t& word, uint64_t value, const WaitReason& reason) {
  while (word == value) wait_on(word, value, false, reason);
}

void poll_while(const uint64_t& word, uint64_t value, const WaitReason& reason) {
  if (word == value) wait_on(word, value, true, reason);
}

int num_agents() { return g_num_agents; }

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

Clock& changing_clock(Thread& thread) {
  ++g_clock_changes[thread.warp];
  return thread.clock;
}

uint64_t num_clock_changes(int warp) { return g_clock_changes[warp]; }

void release_to(Clock& into) {
  Thread& thread = current_thread();
  join(into, thread.clock);
  ++changing_clock(thread)[thread.id];
}

void acquire_from(const Clock& from) { join(changing_clock(current_thread()), from); }

void run_kernel(const void* kernel, const LaunchShape& shape, const KernelCall& call) {
  if (const int refusal = launch_refusal(kernel, shape)) {
    g_launch_error = refusal;
    set_error("the launch was refused: its grid, block or shared memory is too large or empty");
    return;
  }
  g_call = call;
  g_parameters = {reinterpret_cast<uintptr_t>(call.argument), call.argument_bytes};
  g_program = object_range(kernel);
  g_failure.clear();
  g_random_state = seed() * 0x9E3779B97F4A7C15ull + 1;
  Coordinates where{dim3(0, 0, 0), dim3(0, 0, 0), shape.block, shape.grid};
  try {
    if (shape.block.y != 1 || shape.block.z != 1)
      fail("blocks of more dimensions are not emulated");
    for (where.block.z = 0; where.block.z < shape.grid.z; ++where.block.z) {
      for (where.block.y = 0; where.block.y < shape.grid.y; ++where.block.y) {
        for (where.block.x = 0; where.block.x < shape.grid.x; ++where.block.x) {
          run_block(where, shape.shared_bytes);
        }
      }
    }
  } catch (const LaunchFailure& failure) {
    g_running = nullptr;
    g_launch_error = kLaunchFailure;
    set_error(failure.what());
  }
}

void allow_shared_bytes(const void* kernel, unsigned bytes) {
  g_allowed_shared_bytes[kernel] = bytes;
}

int launch_error() { return g_launch_error; }
void clear_launch_error() { g_launch_error = 0; }

}  // namespace drope::emulation
