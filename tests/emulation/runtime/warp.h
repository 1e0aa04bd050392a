// Instructions that a whole warp executes together. Registers are exchanged without any ordering of
// memory; only warp_sync orders.
#pragma once

#include <cstdint>
#include <cstring>

namespace drope::emulation {

enum class ElementType { kBFloat16, kFloat16 };
inline float to_float(uint16_t bits, ElementType type) {
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
uint16_t from_float(float value, ElementType type);  // nearest even

void begin_warps();
void warp_sync();
uint32_t shuffle(uint32_t value, int source_lane);
uint32_t ballot(bool predicate);
bool elect();  // lane 0

void ldmatrix(uint32_t* registers, int num_matrices, bool is_transposed, uint32_t address);
void stmatrix(const uint32_t* registers, int num_matrices, bool is_transposed, uint32_t address);
// d = a . b + c: a (16, 16) 4 registers, b (16, 8) 2 registers, c and d 4 floats.
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c, ElementType type);

}  // namespace drope::emulation
