// What an asm statement of a kernel becomes: its text, unchanged, and its operands.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace drope::emulation {

struct Program;

// One asm statement of a source; parsed when it is first executed.
struct AsmSite {
  const char* text;
  const Program* program = nullptr;
};

struct AsmOperand {
  uint64_t
      bits;  // the value of an input; the address of an output, read there by a text that reads
  uint8_t size;
  char constraint;  // r, l, f, h or n
  bool is_output;
};

constexpr int constraint_bytes(char constraint) {
  return constraint == 'l' ? 8 : constraint == 'h' ? 2 : 4;
}

template <char kConstraint, typename T>
constexpr bool kConstraintFits =
    std::is_same_v<T, float> == (kConstraint == 'f') && sizeof(T) == constraint_bytes(kConstraint);

template <char kConstraint, typename T>
[[gnu::always_inline]] inline AsmOperand asm_output(T& target) {
  static_assert(kConstraintFits<kConstraint, T>);
  return {reinterpret_cast<uint64_t>(&target), sizeof(T), kConstraint, true};
}

template <char kConstraint, typename T>
[[gnu::always_inline]] inline AsmOperand asm_input(const T& value) {
  static_assert(kConstraintFits<kConstraint, T>);
  const T copy = value;
  uint64_t bits = 0;
  std::memcpy(&bits, &copy, sizeof(T));
  return {bits, sizeof(T), kConstraint, false};
}

// Constraint "n".
[[gnu::always_inline]] inline AsmOperand asm_constant(int64_t value) {
  return {static_cast<uint64_t>(value), 8, 'n', false};
}

void run_asm(AsmSite& site, const AsmOperand* operands, int num_operands);

// Its own stores of operands are not the kernel's: no access hooks.
template <typename... Operands>
[[gnu::no_sanitize_thread, gnu::noinline]] void asm_statement(AsmSite& site, Operands... given) {
  const AsmOperand operands[sizeof...(Operands) + 1] = {given...};
  run_asm(site, operands, sizeof...(Operands));
}

}  // namespace drope::emulation
