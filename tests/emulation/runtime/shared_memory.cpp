#include "shared_memory.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "control.h"
#include "device.h"
#include "history.h"

namespace drope::emulation {

alignas(1024) unsigned char g_shared_memory[kMaxSharedBytes];

namespace {

constexpr uint32_t kWindowStart = 1024;  // 0 is no address; tiles at the start are aligned to 1024

// Ordinary stores of one thread that no proxy fence has covered, oldest first.
struct UnfencedStore {
  uint32_t offset, size, epoch;
};

struct UnfencedStores {
  std::vector<UnfencedStore> stores;
  size_t limit = 1024;  // forget those that were overwritten when there are more
};

// What a warp's lanes have all seen, and their epochs at every time they were asked together: a
// stamp of the warp's agent has the place of those in `epochs`, plus one, as its epoch.
struct WarpView {
  uint64_t num_changes = 0;
  Clock seen_by_all;
  std::vector<std::array<uint32_t, kWarpThreads>> epochs;
};

History g_history;
std::vector<UnfencedStores> g_unfenced;  // per thread
std::vector<WarpView> g_views;           // per warp
uint32_t g_size = 0;

// Agents beyond those of clocks: the warps.
int warp_agent(int warp) { return num_agents() + warp; }

const char* agent_kind(int agent) {
  if (agent >= num_agents()) return "warp";
  if (agent < warpgroup_agent(0)) return "thread";
  return agent < bulk_agent(0) ? "wgmma of warpgroup" : "bulk copy";
}

int agent_number(int agent) {
  if (agent >= num_agents()) return agent - num_agents();
  if (agent < warpgroup_agent(0)) return agent;
  return agent < bulk_agent(0) ? agent - warpgroup_agent(0) : agent - bulk_agent(0);
}

bool all_lanes_seen(const Stamp& stamp, const Clock& clock) {
  const int warp = stamp.agent - num_agents();
  const auto& epochs = g_views[warp].epochs[stamp.epoch - 1];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if (epochs[lane] > clock[warp * kWarpThreads + lane]) return false;
  }
  return true;
}

bool has_seen(const Clock& clock, const Stamp& stamp) {
  if (stamp.epoch == 0) return true;
  if (stamp.agent < clock.size()) return stamp.epoch <= clock[stamp.agent];
  return all_lanes_seen(stamp, clock);
}

void check_order(const Stamp& earlier, const char* access, uint32_t offset, const Actor& actor,
                 const char* own_access) {
  if (has_seen(*actor.clock, earlier)) return;
  fail("race: %s %ss shared byte 0x%x, which %s %d %s, with nothing between that orders them",
       actor.name, own_access, offset, agent_kind(earlier.agent), agent_number(earlier.agent),
       access);
}

void check_proxy(const ByteHistory& history, uint32_t offset, const Actor& actor,
                 const char* own_access) {
  if (actor.proxy != Proxy::kAsync) return;
  if (!has_seen(*actor.clock, history.fence)) {
    fail("proxy: %s %ss shared byte 0x%x, and fence.proxy.async of thread %d is not ordered before",
         actor.name, own_access, offset, history.fence.agent);
  }
  if (history.unfenced_writer == 0) return;
  fail("proxy: %s %ss shared byte 0x%x, which thread %d wrote without fence.proxy.async",
       actor.name, own_access, offset, history.unfenced_writer - 1);
}

void check_barrier(const ByteHistory& history, uint32_t offset, const Actor& actor) {
  if (history.in_barrier) fail("%s touches shared byte 0x%x of an mbarrier", actor.name, offset);
}

void add_reader(ByteHistory& history, const Actor& actor) {
  const Stamp mine{actor.epoch, static_cast<uint16_t>(actor.agent)};
  for (Stamp& read : history.reads) {
    if (read.epoch == 0 || read.agent == mine.agent || has_seen(*actor.clock, read)) {
      read = mine;
      return;
    }
  }
  history.reads[actor.agent % kMaxReaders] = mine;
}

// The part of a writer's stores that the fencing thread has seen.
void fence_stores_of(int writer, const Thread& fence) {
  std::vector<UnfencedStore>& stores = g_unfenced[writer].stores;
  size_t done = 0;
  while (done < stores.size() && stores[done].epoch <= fence.clock[writer]) {
    const UnfencedStore& store = stores[done++];
    g_history.visit(store.offset, store.size, [&](ByteHistory& history, uint32_t) {
      if (history.unfenced_writer != writer + 1) return;
      history.unfenced_writer = 0;
      history.fence = {fence.epoch(), static_cast<uint16_t>(fence.id)};
    });
  }
  stores.erase(stores.begin(), stores.begin() + static_cast<std::ptrdiff_t>(done));
}

void remember_unfenced(int writer, const UnfencedStore& store) {
  UnfencedStores& mine = g_unfenced[writer];
  if (!mine.stores.empty()) {
    UnfencedStore& last = mine.stores.back();
    if (last.epoch == store.epoch && last.offset + last.size == store.offset) {
      last.size += store.size;
      return;
    }
  }
  if (mine.stores.size() >= mine.limit) {
    const auto is_overwritten = [&](const UnfencedStore& one) {
      bool is_live = false;
      g_history.visit(one.offset, one.size, [&](const ByteHistory& history, uint32_t) {
        is_live |= history.unfenced_writer == writer + 1 && history.write.epoch == one.epoch;
      });
      return !is_live;
    };
    mine.stores.erase(std::remove_if(mine.stores.begin(), mine.stores.end(), is_overwritten),
                      mine.stores.end());
    mine.limit = 2 * mine.stores.size() + 1024;
  }
  mine.stores.push_back(store);
}

uint32_t offset_of(const unsigned char* bytes, uint32_t size, const char* who) {
  const uint32_t offset = static_cast<uint32_t>(bytes - g_shared_memory);
  if (offset + size > g_size) {
    fail("%s touches shared byte 0x%x; the block has 0x%x", who, offset, g_size);
  }
  return offset;
}

void look_again(WarpView& view, int warp) {
  const Thread* lanes = &block_threads()[warp * kWarpThreads];
  view.num_changes = num_clock_changes(warp);
  view.seen_by_all = lanes[0].clock;
  view.epochs.emplace_back();
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const Clock& clock = lanes[lane].clock;
    view.epochs.back()[lane] = lanes[lane].epoch();
    for (size_t i = 0; i < clock.size(); ++i) {
      view.seen_by_all[i] = std::min(view.seen_by_all[i], clock[i]);
    }
  }
}

}  // namespace

Actor current_actor(const char* name) {
  const Thread& thread = current_thread();
  return {thread.id, thread.epoch(), &thread.clock, Proxy::kGeneric, name};
}

Actor current_warp_actor(const char* name) {
  const int warp = current_thread().warp;
  WarpView& view = g_views[warp];
  if (view.num_changes != num_clock_changes(warp)) look_again(view, warp);
  const auto epoch = static_cast<uint32_t>(view.epochs.size());
  return {warp_agent(warp), epoch, &view.seen_by_all, Proxy::kGeneric, name};
}

void begin_shared_memory(unsigned size) {
  g_size = size;
  std::memset(g_shared_memory, 0xff, size);
  g_history.begin(size);
  g_unfenced.assign(block_threads().size(), UnfencedStores());
  g_views.assign((block_threads().size() + kWarpThreads - 1) / kWarpThreads, WarpView());
}

unsigned char* dynamic_shared_memory() { return g_shared_memory; }

uint32_t shared_address(const void* pointer) {
  const auto* bytes = static_cast<const unsigned char*>(pointer);
  if (bytes < g_shared_memory || bytes > g_shared_memory + g_size) {
    fail("no pointer into shared memory");
  }
  return static_cast<uint32_t>(bytes - g_shared_memory) + kWindowStart;
}

unsigned char* shared_bytes(uint32_t address, uint32_t size, uint32_t alignment, const char* what) {
  if (address % alignment != 0) {
    fail("%s: shared address 0x%x is not a multiple of %u", what, address, alignment);
  }
  if (address < kWindowStart || address - kWindowStart + size > g_size) {
    fail("%s: shared address 0x%x and %u bytes are outside of the block's memory", what, address,
         size);
  }
  return g_shared_memory + (address - kWindowStart);
}

void note_read(const unsigned char* bytes, uint32_t size, const Actor& actor) {
  const uint32_t offset = offset_of(bytes, size, actor.name);
  g_history.visit(offset, size, [&](ByteHistory& history, uint32_t at) {
    check_barrier(history, at, actor);
    check_order(history.write, "wrote", at, actor, "read");
    check_proxy(history, at, actor, "read");
    add_reader(history, actor);
  });
}

void note_write(const unsigned char* bytes, uint32_t size, const Actor& actor) {
  const uint32_t offset = offset_of(bytes, size, actor.name);
  const bool is_ordinary = actor.proxy == Proxy::kGeneric;
  g_history.visit_uniformly(offset, size, [&](ByteHistory& history, uint32_t at) {
    check_barrier(history, at, actor);
    check_order(history.write, "wrote", at, actor, "write");
    check_proxy(history, at, actor, "write");
    for (Stamp& read : history.reads) {
      check_order(read, "read", at, actor, "write");
      read = Stamp();
    }
    history.fence = Stamp();
    history.write = {actor.epoch, static_cast<uint16_t>(actor.agent)};
    history.unfenced_writer = is_ordinary ? static_cast<uint16_t>(actor.agent + 1) : 0;
  });
  if (is_ordinary) remember_unfenced(actor.agent, {offset, size, actor.epoch});
}

void mark_barrier(const unsigned char* bytes, bool is_barrier) {
  const uint32_t offset = offset_of(bytes, 8, "mbarrier");
  g_history.visit(offset, 8, [&](ByteHistory& history, uint32_t) {
    history = ByteHistory();
    history.in_barrier = is_barrier;
  });
}

void fence_proxy_async() {
  count(Event::kProxyFence);
  const Thread& thread = current_thread();
  for (int writer = 0; writer < static_cast<int>(g_unfenced.size()); ++writer) {
    if (!g_unfenced[writer].stores.empty()) fence_stores_of(writer, thread);
  }
}

void poison(unsigned char* bytes, uint32_t size) { std::memset(bytes, 0xff, size); }

}  // namespace drope::emulation
