#include "frame.h"

namespace drope::emulation {
namespace {

struct SpecialRegister {
  const char* name;
  uint32_t (*read)(const Thread&);
};

const SpecialRegister kSpecialRegisters[] = {
    {"%tid.x", [](const Thread& thread) { return thread.coordinates.thread.x; }},
    {"%ctaid.x", [](const Thread& thread) { return thread.coordinates.block.x; }},
    {"%ctaid.y", [](const Thread& thread) { return thread.coordinates.block.y; }},
    {"%nctaid.x", [](const Thread& thread) { return thread.coordinates.grid_size.x; }},
    {"%laneid", [](const Thread& thread) { return static_cast<uint32_t>(thread.lane); }},
};

}  // namespace

int special_register(const std::string& name) {
  int place = 0;
  for (const SpecialRegister& one : kSpecialRegisters) {
    if (name == one.name) return place;
    ++place;
  }
  return -1;
}

uint64_t Frame::other_value(const Operand& operand) const {
  switch (operand.kind) {
    case Operand::Kind::kRegister:
      if (!(is_set >> operand.number & 1)) {
        fail("PTX: a register is read before it is set in: %s", text);
      }
      return registers[operand.number];
    case Operand::Kind::kImmediate:
      return static_cast<uint64_t>(operand.number);
    case Operand::Kind::kSpecial:
      return kSpecialRegisters[operand.number].read(current_thread());
    default:
      fail("PTX: an operand of the wrong kind in: %s", text);
  }
}

void Frame::set(const Operand& operand, uint64_t value) {
  if (operand.kind == Operand::Kind::kSink) return;
  if (operand.kind == Operand::Kind::kRegister) {
    registers[operand.number] = value;
    is_set |= 1u << operand.number;
    return;
  }
  if (operand.kind != Operand::Kind::kAsmOperand) fail("PTX: no place for a result in: %s", text);
  const AsmOperand& target = asm_operand(operand);
  if (!target.is_output) fail("PTX: an input is written in: %s", text);
  std::memcpy(reinterpret_cast<void*>(target.bits), &value, target.size);
}

void Frame::set_real(const Operand& operand, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  set(operand, bits);
}

float* Frame::accumulator(const Operand& operand) const {
  if (operand.kind != Operand::Kind::kAsmOperand) fail("PTX: no accumulator in: %s", text);
  const AsmOperand& target = asm_operand(operand);
  if (!target.is_output || target.constraint != 'f') {
    fail("PTX: no \"+f\" operand in: %s", text);
  }
  return reinterpret_cast<float*>(target.bits);
}

uint32_t Frame::shared(const Operand& address) const {
  if (address.kind != Operand::Kind::kAddress) fail("PTX: no address in: %s", text);
  const Operand& base = address.parts[0];
  const bool is_word = base.kind != Operand::Kind::kAsmOperand || asm_operand(base).size == 4;
  if (!is_word) fail("PTX: a shared address is not an \"r\" operand in: %s", text);
  return static_cast<uint32_t>(value(base) + static_cast<uint64_t>(address.number));
}

void* Frame::global(const Operand& address) const {
  if (address.kind != Operand::Kind::kAddress) fail("PTX: no address in: %s", text);
  const Operand& base = address.parts[0];
  const bool is_pointer = base.kind != Operand::Kind::kAsmOperand || asm_operand(base).size == 8;
  if (!is_pointer) fail("PTX: a global address is not an \"l\" operand in: %s", text);
  return reinterpret_cast<void*>(value(base) + static_cast<uint64_t>(address.number));
}

void Frame::require(const Instruction& instruction, size_t count) const {
  if (instruction.operands.size() == count) return;
  fail("PTX: %s has %zu operands, not %zu, in: %s", instruction.opcode.c_str(),
       instruction.operands.size(), count, text);
}

}  // namespace drope::emulation
