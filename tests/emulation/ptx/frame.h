// A running asm statement: its operands and registers.
#pragma once

#include <cstdint>
#include <string>

#include "asm_statement.h"
#include "program.h"

namespace drope::emulation {

constexpr int kMaxRegisters = 16;

// Place of %tid.x and its like; -1: not known.
int special_register(const std::string& name);

struct Frame {
  const char* text;
  AsmOperand* operands;
  int num_operands;
  int next = 0;  // instruction
  uint64_t registers[kMaxRegisters] = {};
  bool is_set[kMaxRegisters] = {};

  uint64_t value(const Operand& operand) const;
  int32_t integer(const Operand& operand) const { return static_cast<int32_t>(value(operand)); }
  float real(const Operand& operand) const;
  void set(const Operand& operand, uint64_t value);
  void set_real(const Operand& operand, float value);
  // The float that an accumulator operand names.
  float* accumulator(const Operand& operand) const;
  uint32_t shared(const Operand& address) const;
  void* global(const Operand& address) const;
  // Fails unless the instruction has this many operands.
  void require(const Instruction& instruction, size_t num_operands) const;

 private:
  AsmOperand& asm_operand(const Operand& operand) const;
};

}  // namespace drope::emulation
