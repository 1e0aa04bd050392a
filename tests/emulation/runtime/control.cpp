#include "control.h"

#include <cstring>
#include <string>

#include "machine.h"

namespace drope::emulation {
namespace {

constexpr int kNumEvents = static_cast<int>(Event::kNumEvents);
constexpr const char* kEventNames[kNumEvents] = {
    "bar_sync",        "bulk_load",     "bulk_store",   "cp_async",    "elect",      "ldmatrix",
    "mbarrier_arrive", "mbarrier_wait", "mma",          "proxy_fence", "red_global", "shuffle",
    "stmatrix",        "tensor_load",   "tensor_store", "wgmma"};

Completion g_completion = Completion::kAtIssue;
uint64_t g_seed = 1;
int64_t g_counts[kNumEvents];
std::string g_error;

}  // namespace

Completion completion() { return g_completion; }
uint64_t seed() { return g_seed; }
void count(Event event) { ++g_counts[static_cast<int>(event)]; }
void set_error(const char* message) { g_error = message; }

}  // namespace drope::emulation

using namespace drope::emulation;

// Also forgets counts and the last error.
extern "C" void emulation_configure(int completion, uint64_t seed) {
  g_completion = static_cast<Completion>(completion);
  g_seed = seed;
  g_error.clear();
  std::memset(g_counts, 0, sizeof(g_counts));
}

// Name and count of event number i; null behind the last.
extern "C" const char* emulation_event(int i, int64_t* count) {
  if (i >= kNumEvents) return nullptr;
  *count = g_counts[i];
  return kEventNames[i];
}

extern "C" const char* emulation_error() { return g_error.c_str(); }
