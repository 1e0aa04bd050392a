#include "warp.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "control.h"
#include "machine.h"
#include "shared_memory.h"

namespace drope::emulation {
namespace {

constexpr int kMaxWords = 10;

struct Slot {
  uint32_t words[kMaxWords];  // what the lane brings, then what it gets
  const char* operation;
};

// Two sets of slots: a lane may enter the next exchange while others still read this one's.
struct Warp {
  uint64_t generation = 0;
  int num_arrived = 0;
  Slot slots[2][kWarpThreads];
  Clock arriving;
};

std::vector<Warp> g_warps;

void check_same(const Slot* slots, const char* operation, int num_lanes) {
  for (int lane = 0; lane < num_lanes; ++lane) {
    const char* other = slots[lane].operation;
    if (other == operation || std::strcmp(other, operation) == 0) continue;
    fail("divergent warp: this lane executes %s, lane %d executes %s", operation, lane, other);
  }
}

// All lanes bring words; the last to come performs the instruction for the whole warp. Returns the
// lanes' slots. Fails when they execute different instructions.
template <typename Perform>
const Slot* collective(const char* operation, const uint32_t* words, int num_words,
                       const Perform& perform) {
  const Thread& thread = current_thread();
  Warp& warp = g_warps[thread.warp];
  const uint64_t generation = warp.generation;
  Slot* slots = warp.slots[generation % 2];
  std::memcpy(slots[thread.lane].words, words, num_words * sizeof(*words));
  slots[thread.lane].operation = operation;
  if (++warp.num_arrived == warp_size(thread.warp)) {
    check_same(slots, operation, warp.num_arrived);
    perform(slots);
    warp.num_arrived = 0;
    ++warp.generation;
  } else {
    wait_while(warp.generation, generation, {operation, " of warp %lld", {thread.warp}});
  }
  return slots;
}

const Slot* exchange(const char* operation, const uint32_t* words, int num_words) {
  return collective(operation, words, num_words, [](Slot*) {});
}

void require_full_warp(const char* operation) {
  if (warp_size(current_thread().warp) != kWarpThreads) fail("%s in a partial warp", operation);
}

// One per warp: lane 0 counts.
void count_once(Event event) {
  if (current_thread().lane == 0) count(event);
}

unsigned char* row_of(const Slot* slots, int matrix, int row, const char* what) {
  return shared_bytes(slots[matrix * 8 + row].words[0], 16, 16, what);
}

// PTX ISA, "ldmatrix": eight rows of 16 bytes to one register of every lane.
void load_matrix(Slot* slots, int matrix, bool is_transposed, const Actor& actor) {
  uint16_t elements[8][8];
  for (int row = 0; row < 8; ++row) {
    const unsigned char* bytes = row_of(slots, matrix, row, "ldmatrix");
    note_read(bytes, 16, actor);
    std::memcpy(elements[row], bytes, 16);
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const int line = lane / 4, pair = 2 * (lane % 4);
    const uint16_t low = is_transposed ? elements[pair][line] : elements[line][pair];
    const uint16_t high = is_transposed ? elements[pair + 1][line] : elements[line][pair + 1];
    // Behind the addresses, which the next matrix still needs.
    slots[lane].words[1 + matrix] = low | static_cast<uint32_t>(high) << 16;
  }
}

template <ElementType kType>
void widen_pair(uint32_t word, float& low, float& high) {
  low = to_float(static_cast<uint16_t>(word), kType);
  high = to_float(static_cast<uint16_t>(word >> 16), kType);
}

// Words: a (4), b (2), c (4); d replaces c. The fragments are those of the PTX ISA.
template <ElementType kType>
void multiply(Slot* slots) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const uint32_t* words = slots[lane].words;
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      float* two = &a[group + 8 * (i % 2)][pair + 8 * (i / 2)];
      widen_pair<kType>(words[i], two[0], two[1]);
      std::memcpy(&c[group + 8 * (i / 2)][pair + i % 2], &words[6 + i], 4);
    }
    for (int i = 0; i < 2; ++i) {
      widen_pair<kType>(words[4 + i], b[pair + 8 * i][group], b[pair + 8 * i + 1][group]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&slots[lane].words[6 + i], &c[group + 8 * (i / 2)][pair + i % 2], 4);
    }
  }
}

}  // namespace

uint16_t from_float(float value, ElementType type) {
  if (std::isnan(value)) return 0x7fff;
  uint16_t bits;
  if (type == ElementType::kFloat16) {
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

void begin_warps() {
  const size_t num_threads = block_threads().size();
  g_warps.assign((num_threads + kWarpThreads - 1) / kWarpThreads, Warp());
  for (Warp& warp : g_warps) {
    warp.arriving.assign(num_agents(), 0);
  }
}

void warp_sync() {
  Warp& warp = g_warps[current_thread().warp];
  release_to(warp.arriving);
  exchange("bar.warp.sync", nullptr, 0);
  acquire_from(warp.arriving);
}

uint32_t shuffle(uint32_t value, int source_lane) {
  require_full_warp("shfl");
  count_once(Event::kShuffle);
  return exchange("shfl", &value, 1)[source_lane & (kWarpThreads - 1)].words[0];
}

uint32_t ballot(bool predicate) {
  const uint32_t word = predicate;
  const Slot* slots = exchange("vote", &word, 1);
  uint32_t mask = 0;
  for (int lane = 0; lane < warp_size(current_thread().warp); ++lane) {
    mask |= slots[lane].words[0] << lane;
  }
  return mask;
}

bool elect() {
  require_full_warp("elect.sync");
  count_once(Event::kElect);
  exchange("elect.sync", nullptr, 0);
  return current_thread().lane == 0;
}

void ldmatrix(uint32_t* registers, int num_matrices, bool is_transposed, uint32_t address) {
  require_full_warp("ldmatrix");
  count_once(Event::kLdmatrix);
  const Slot* slots = collective("ldmatrix", &address, 1, [=](Slot* given) {
    const Actor actor = current_warp_actor("ldmatrix");
    for (int i = 0; i < num_matrices; ++i) load_matrix(given, i, is_transposed, actor);
  });
  std::memcpy(registers, slots[current_thread().lane].words + 1, 4 * num_matrices);
}

void stmatrix(const uint32_t* registers, int num_matrices, bool is_transposed, uint32_t address) {
  require_full_warp("stmatrix");
  count_once(Event::kStmatrix);
  const Slot* slots = exchange("stmatrix", &address, 1);
  const int lane = current_thread().lane;
  for (int matrix = 0; matrix < num_matrices; ++matrix) {
    for (int half = 0; half < 2; ++half) {
      const int pair = 2 * (lane % 4) + half, line = lane / 4;
      const int row = is_transposed ? pair : line, column = is_transposed ? line : pair;
      unsigned char* bytes = row_of(slots, matrix, row, "stmatrix") + 2 * column;
      note_write(bytes, 2, current_actor("stmatrix"));
      const uint16_t value = static_cast<uint16_t>(registers[matrix] >> (16 * half));
      std::memcpy(bytes, &value, 2);
    }
  }
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c,
                  ElementType type) {
  require_full_warp("mma");
  count_once(Event::kMma);
  uint32_t words[kMaxWords] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::memcpy(words + 6, c, 16);
  const bool is_bf16 = type == ElementType::kBFloat16;
  const char* operation = is_bf16 ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16";
  const Slot* slots = collective(operation, words, kMaxWords, [=](Slot* given) {
    if (is_bf16) {
      multiply<ElementType::kBFloat16>(given);
    } else {
      multiply<ElementType::kFloat16>(given);
    }
  });
  std::memcpy(d, slots[current_thread().lane].words + 6, 16);
}

}  // namespace drope::emulation
