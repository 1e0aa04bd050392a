// The text of an asm statement, parsed: instructions, their guards and operands.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace drope::emulation {

struct Frame;
struct Instruction;
using Handler = void (*)(Frame&, const Instruction&);

struct Operand {
  enum class Kind {
    kAsmOperand,  // %number
    kRegister,    // declared in the text; number: its place
    kImmediate,   // number
    kSpecial,     // number: place in the table of special registers
    kAddress,     // [parts[0] + number], or [parts[0], parts[1]] of a tensor copy
    kList,        // {parts}
    kPair,        // parts[0] | parts[1]
    kSink,        // _
  };
  Kind kind = Kind::kSink;
  int64_t number = 0;
  std::vector<Operand> parts;
};

struct Instruction {
  std::string opcode;
  std::string text;
  std::vector<Operand> operands;
  bool has_guard = false, guard_is_negated = false;
  Operand guard;
  Handler handler = nullptr;
  int target = -1;         // of a branch
  int parameters[4] = {};  // what the handler's maker read off the opcode
};

struct Program {
  std::vector<Instruction> instructions;
  std::map<std::string, int> labels, registers;
};

// Fails on what it does not understand, with the text.
Program parse_program(const char* text);

}  // namespace drope::emulation
