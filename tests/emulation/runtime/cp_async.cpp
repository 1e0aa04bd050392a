#include "cp_async.h"

#include <cstring>
#include <deque>
#include <vector>

#include "control.h"
#include "device_memory.h"
#include "machine.h"
#include "shared_memory.h"

namespace drope::emulation {
namespace {

struct Copy {
  unsigned char* target;
  const void* global;
  int source_bytes;
  bool is_done;

  void perform() {
    if (is_done) return;
    is_done = true;
    std::memset(target, 0, 16);
    std::memcpy(target, global, source_bytes);
  }
};

using Group = std::vector<Copy>;

struct Copies {
  Group open;
  std::deque<Group> groups;
};

std::vector<Copies> g_copies;  // per thread

}  // namespace

void begin_cp_async() { g_copies.assign(block_threads().size(), Copies()); }

void cp_async_16(uint32_t address, const void* global, int source_bytes) {
  count(Event::kCpAsync);
  if (source_bytes < 0 || source_bytes > 16) fail("cp.async reads %d bytes", source_bytes);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("cp.async: global address not aligned");
  if (source_bytes > 0) check_device_access(global, source_bytes, "cp.async");
  Copy copy{shared_bytes(address, 16, 16, "cp.async"), global, source_bytes, false};
  note_write(copy.target, 16, current_actor("cp.async"));
  if (happens_now()) {
    copy.perform();
  } else {
    poison(copy.target, 16);
  }
  g_copies[current_thread().id].open.push_back(copy);
}

void cp_async_commit_group() {
  Copies& mine = g_copies[current_thread().id];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void cp_async_wait_group(int num_pending) {
  Copies& mine = g_copies[current_thread().id];
  while (static_cast<int>(mine.groups.size()) > num_pending) {
    for (Copy& copy : mine.groups.front()) {
      // Again, now: whoever reads must have seen this wait, not only the issue.
      note_write(copy.target, 16, current_actor("cp.async"));
      copy.perform();
    }
    mine.groups.pop_front();
  }
}

void end_cp_async() {
  for (size_t thread = 0; thread < g_copies.size(); ++thread) {
    bool is_pending = !g_copies[thread].open.empty();
    for (const Group& group : g_copies[thread].groups) is_pending |= !group.empty();
    if (is_pending) fail("thread %zu ended with cp.async copies that it did not wait for", thread);
  }
}

}  // namespace drope::emulation
