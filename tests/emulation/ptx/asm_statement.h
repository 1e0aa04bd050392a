// What an asm statement of a kernel becomes: its text, unchanged, and its operands.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace drope::emulation {

struct AsmOperand {
  void* target;    // of an output, which is read there when the text reads it
  uint64_t value;  // of an input
  uint8_t size;
  char constraint;  // r, l, f, h or n
};

constexpr int constraint_bytes(char constraint) {
  return constraint == 'l' ? 8 : constraint == 'h' ? 2 : 4;
}

template <char kConstraint, typename T>
constexpr bool kConstraintFits =
    std::is_same_v<T, float> == (kConstraint == 'f') && sizeof(T) == constraint_bytes(kConstraint);

template <char kConstraint, typename T>
AsmOperand asm_output(T& target) {
  static_assert(kConstraintFits<kConstraint, T>);
  return {static_cast<void*>(&target), 0, sizeof(T), kConstraint};
}

template <char kConstraint, typename T>
AsmOperand asm_input(const T& value) {
  static_assert(kConstraintFits<kConstraint, T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return {nullptr, bits, sizeof(T), kConstraint};
}

// Constraint "n".
inline AsmOperand asm_constant(int64_t value) {
  return {nullptr, static_cast<uint64_t>(value), 8, 'n'};
}

void run_asm(const char* text, AsmOperand* operands, int num_operands);

template <typename... Operands>
void asm_statement(const char* text, Operands... given) {
  AsmOperand operands[sizeof...(Operands) + 1] = {given...};
  run_asm(text, operands, sizeof...(Operands));
}

}  // namespace drope::emulation
