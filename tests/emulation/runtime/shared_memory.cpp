#include "shared_memory.h"

#include <algorithm>
#include <cstring>

#include "control.h"
#include "launch.h"

namespace drope::emulation {
namespace {

constexpr uint32_t kWindowStart = 1024;  // 0 is no address; tiles at the start are aligned to 1024
constexpr int kMaxReaders = 4;           // more concurrent readers of a byte are forgotten

struct Stamp {
  uint32_t epoch = 0;  // 0: nobody
  uint16_t agent = 0;
};

struct ByteHistory {
  Stamp write;
  Stamp reads[kMaxReaders];
  Stamp fence;                   // the proxy fence after the last ordinary write
  uint16_t unfenced_writer = 0;  // thread + 1, when only ordinary accesses may see the byte
  bool in_barrier = false;
};

// Ordinary stores of one thread that no proxy fence has covered, oldest first.
struct UnfencedStore {
  uint32_t offset, size, epoch;
};

alignas(1024) unsigned char g_memory[kMaxSharedBytes];
std::vector<ByteHistory> g_history;
std::vector<std::vector<UnfencedStore>> g_unfenced;  // per thread
uint32_t g_size = 0;

const char* agent_kind(int agent) {
  if (agent < warpgroup_agent(0)) return "thread";
  return agent < bulk_agent(0) ? "wgmma of warpgroup" : "bulk copy";
}

int agent_number(int agent) {
  if (agent < warpgroup_agent(0)) return agent;
  return agent < bulk_agent(0) ? agent - warpgroup_agent(0) : agent - bulk_agent(0);
}

void check_order(const Stamp& earlier, const char* access, uint32_t offset, const Actor& actor,
                 const char* own_access) {
  if (earlier.epoch <= (*actor.clock)[earlier.agent]) return;
  fail("race: %s %ss shared byte 0x%x, which %s %d %s, with nothing between that orders them",
       actor.name, own_access, offset, agent_kind(earlier.agent), agent_number(earlier.agent),
       access);
}

void check_proxy(const ByteHistory& history, uint32_t offset, const Actor& actor,
                 const char* own_access) {
  if (actor.proxy != Proxy::kAsync) return;
  if (history.fence.epoch > (*actor.clock)[history.fence.agent]) {
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
    if (read.epoch == 0 || read.agent == mine.agent || read.epoch <= (*actor.clock)[read.agent]) {
      read = mine;
      return;
    }
  }
  history.reads[actor.agent % kMaxReaders] = mine;
}

// The part of a writer's stores that the fencing thread has seen.
void fence_stores_of(int writer, const Thread& fence) {
  std::vector<UnfencedStore>& stores = g_unfenced[writer];
  size_t done = 0;
  while (done < stores.size() && stores[done].epoch <= fence.clock[writer]) {
    const UnfencedStore& store = stores[done++];
    for (uint32_t i = store.offset; i < store.offset + store.size; ++i) {
      if (g_history[i].unfenced_writer != writer + 1) continue;
      g_history[i].unfenced_writer = 0;
      g_history[i].fence = {fence.epoch(), static_cast<uint16_t>(fence.id)};
    }
  }
  stores.erase(stores.begin(), stores.begin() + done);
}

uint32_t offset_of(const unsigned char* bytes, uint32_t size, const char* who) {
  const uint32_t offset = static_cast<uint32_t>(bytes - g_memory);
  if (offset + size > g_size) {
    fail("%s touches shared byte 0x%x; the block has 0x%x", who, offset, g_size);
  }
  return offset;
}

}  // namespace

Actor current_actor(const char* name) {
  const Thread& thread = current_thread();
  return {thread.id, thread.epoch(), &thread.clock, Proxy::kGeneric, name};
}

void begin_shared_memory(unsigned size) {
  g_size = size;
  std::memset(g_memory, 0xff, size);
  g_history.assign(size, ByteHistory());
  g_unfenced.assign(block_threads().size(), {});
}

unsigned char* dynamic_shared_memory() { return g_memory; }

bool is_shared(const void* pointer) {
  const auto* bytes = static_cast<const unsigned char*>(pointer);
  return bytes >= g_memory && bytes < g_memory + kMaxSharedBytes;
}

uint32_t shared_address(const void* pointer) {
  const auto* bytes = static_cast<const unsigned char*>(pointer);
  if (bytes < g_memory || bytes > g_memory + g_size) fail("no pointer into shared memory");
  return static_cast<uint32_t>(bytes - g_memory) + kWindowStart;
}

unsigned char* shared_bytes(uint32_t address, uint32_t size, uint32_t alignment, const char* what) {
  if (address % alignment != 0) {
    fail("%s: shared address 0x%x is not a multiple of %u", what, address, alignment);
  }
  if (address < kWindowStart || address - kWindowStart + size > g_size) {
    fail("%s: shared address 0x%x and %u bytes are outside of the block's memory", what, address,
         size);
  }
  return g_memory + (address - kWindowStart);
}

void note_read(const unsigned char* bytes, uint32_t size, const Actor& actor) {
  const uint32_t offset = offset_of(bytes, size, actor.name);
  for (uint32_t i = offset; i < offset + size; ++i) {
    ByteHistory& history = g_history[i];
    check_barrier(history, i, actor);
    check_order(history.write, "wrote", i, actor, "read");
    check_proxy(history, i, actor, "read");
    add_reader(history, actor);
  }
}

void note_write(const unsigned char* bytes, uint32_t size, const Actor& actor) {
  const uint32_t offset = offset_of(bytes, size, actor.name);
  const bool is_ordinary = actor.proxy == Proxy::kGeneric;
  for (uint32_t i = offset; i < offset + size; ++i) {
    ByteHistory& history = g_history[i];
    check_barrier(history, i, actor);
    check_order(history.write, "wrote", i, actor, "write");
    check_proxy(history, i, actor, "write");
    for (Stamp& read : history.reads) {
      check_order(read, "read", i, actor, "write");
      read = Stamp();
    }
    history.fence = Stamp();
    history.write = {actor.epoch, static_cast<uint16_t>(actor.agent)};
    history.unfenced_writer = is_ordinary ? static_cast<uint16_t>(actor.agent + 1) : 0;
  }
  if (is_ordinary) g_unfenced[actor.agent].push_back({offset, size, actor.epoch});
}

void mark_barrier(const unsigned char* bytes, bool is_barrier) {
  const uint32_t offset = offset_of(bytes, 8, "mbarrier");
  for (uint32_t i = offset; i < offset + 8; ++i) {
    g_history[i] = ByteHistory();
    g_history[i].in_barrier = is_barrier;
  }
}

void fence_proxy_async() {
  count(Event::kProxyFence);
  const Thread& thread = current_thread();
  for (int writer = 0; writer < static_cast<int>(g_unfenced.size()); ++writer) {
    if (!g_unfenced[writer].empty()) fence_stores_of(writer, thread);
  }
}

void poison(unsigned char* bytes, uint32_t size) { std::memset(bytes, 0xff, size); }

}  // namespace drope::emulation
