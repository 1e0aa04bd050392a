// A running asm statement: its operands and registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "../runtime/machine.h"
#include "asm_statement.h"
#include "program.h"

namespace drope::emulation {

constexpr int kMaxRegisters = 16;

// Place of %tid.x and its like; -1: not known.
int special_register(const std::string& name);

struct Frame {
  const char* text;
  const AsmOperand* operands;
  int num_operands;
  int next = 0;  // instruction
  uint32_t is_set = 0;
  uint64_t registers[kMaxRegisters];

  Frame(const char* text_, const AsmOperand* operands_, int num_operands_)
      : text(text_), operands(operands_), num_operands(num_operands_) {}

  uint64_t value(const Operand& operand) const {
    if (operand.kind != Operand::Kind::kAsmOperand) return other_value(operand);
    const AsmOperand& given = asm_operand(operand);
    if (!given.is_output) return given.bits;
    uint64_t bits = 0;
    std::memcpy(&bits, reinterpret_cast<const void*>(given.bits), given.size);
    return bits;
  }
  int32_t integer(const Operand& operand) const { return static_cast<int32_t>(value(operand)); }
  float real(const Operand& operand) const {
    const uint32_t bits = static_cast<uint32_t>(value(operand));
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }
  void set(const Operand& operand, uint64_t value);
  void set_real(const Operand& operand, float value);
  // The float that an accumulator operand names.
  float* accumulator(const Operand& operand) const;
  uint32_t shared(const Operand& address) const;
  void* global(const Operand& address) const;
  // Fails unless the operand is {that many registers}.
  void require_list(const Operand& operand, int size) const {
    const bool is_list = operand.kind == Operand::Kind::kList;
    if (is_list && operand.parts.size() == static_cast<size_t>(size)) return;
    fail("PTX: no list of %d registers in: %s", size, text);
  }
  // Fails unless the instruction has this many operands.
  void require(const Instruction& instruction, size_t num_operands) const;

 private:
  uint64_t other_value(const Operand& operand) const;
  const AsmOperand& asm_operand(const Operand& operand) const {
    if (operand.number < num_operands) return operands[operand.number];
    fail("PTX: operand %%%d does not exist in: %s", static_cast<int>(operand.number), text);
  }
};

}  // namespace drope::emulation
