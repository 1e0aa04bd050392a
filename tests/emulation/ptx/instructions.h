// The instructions that the emulator knows, each by its whole opcode.
#pragma once

#include "program.h"

namespace drope::emulation {

// Sets the handler, and the parameters that its opcode states. Fails on an unknown opcode.
void find_instruction(Instruction& instruction);

struct Row {
  const char* opcode;
  size_t num_operands;
  Handler handler;
  int parameters[4];
};

struct Table {
  const Row* rows;
  size_t num_rows;
};

Table arithmetic_instructions();
Table synchronisation_instructions();
Table copy_instructions();
Table matrix_instructions();
// wgmma.mma_async comes in a shape for every n: recognised by its pattern, not by a row.
bool find_wgmma(Instruction& instruction);

}  // namespace drope::emulation
