#include "warp.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "control.h"
#include "machine.h"
#include "shared_memory.h"

namespace drope::emulation {
namespace {

constexpr int kMaxWords = 6;

struct Slot {
  uint32_t words[kMaxWords];
  const char* operation;
};

// Two sets of slots: a lane may enter the next exchange while others still read this one's.
struct Warp {
  uint64_t generation = 0;
  int num_arrived = 0;
  Slot slots[2][kWarpThreads];
  Clock arriving, synchronised;
};

std::vector<Warp> g_warps;

// All lanes bring words and see everybody's. Fails when they execute different instructions.
const Slot* exchange(const char* operation, const uint32_t* words, int num_words) {
  const Thread& thread = current_thread();
  Warp& warp = g_warps[thread.warp];
  const uint64_t generation = warp.generation;
  Slot* slots = warp.slots[generation % 2];
  std::memcpy(slots[thread.lane].words, words, num_words * sizeof(*words));
  slots[thread.lane].operation = operation;
  if (++warp.num_arrived == warp_size(thread.warp)) {
    warp.num_arrived = 0;
    ++warp.generation;
  } else {
    wait_while(warp.generation, generation, "%s of warp %d", operation, thread.warp);
  }
  for (int lane = 0; lane < warp_size(thread.warp); ++lane) {
    if (std::strcmp(slots[lane].operation, operation) != 0) {
      fail("divergent warp: this lane executes %s, lane %d executes %s", operation, lane,
           slots[lane].operation);
    }
  }
  return slots;
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

}  // namespace

float to_float(uint16_t bits, ElementType type) {
  if (type == ElementType::kFloat16) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

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
    warp.synchronised = warp.arriving;
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
  const Slot* slots = exchange("ldmatrix", &address, 1);
  const int lane = current_thread().lane;
  for (int matrix = 0; matrix < num_matrices; ++matrix) {
    uint16_t halves[2];
    for (int half = 0; half < 2; ++half) {
      const int pair = 2 * (lane % 4) + half, line = lane / 4;
      const int row = is_transposed ? pair : line, column = is_transposed ? line : pair;
      const unsigned char* bytes = row_of(slots, matrix, row, "ldmatrix") + 2 * column;
      note_read(bytes, 2, current_actor("ldmatrix"));
      std::memcpy(&halves[half], bytes, 2);
    }
    registers[matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
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
  const uint32_t words[kMaxWords] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const Slot* slots = exchange("mma.m16n8k16", words, kMaxWords);
  const int group = current_thread().lane / 4, in_group = current_thread().lane % 4;
  float sum[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < 16; ++k) {
    const int holder = k % 8 / 2, upper = k / 8;
    const auto element = [&](uint32_t word) {
      return to_float(static_cast<uint16_t>(word >> (16 * (k % 2))), type);
    };
    for (int e = 0; e < 4; ++e) {
      const int column = 2 * in_group + e % 2;
      const uint32_t a_word = slots[group * 4 + holder].words[2 * upper + e / 2];
      const uint32_t b_word = slots[column * 4 + holder].words[4 + upper];
      sum[e] += element(a_word) * element(b_word);
    }
  }
  std::memcpy(d, sum, sizeof(sum));
}

}  // namespace drope::emulation
