#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "../runtime/control.h"
#include "../runtime/machine.h"
#include "frame.h"
#include "instructions.h"

namespace drope::emulation {
namespace {

// By text: a site that is inlined twice parses once.
std::unordered_map<std::string, Program> g_programs;

const Program& program_of(AsmSite& site) {
  if (site.program) return *site.program;
  auto found = g_programs.find(site.text);
  if (found == g_programs.end()) {
    found = g_programs.emplace(site.text, parse_program(site.text)).first;
  }
  site.program = &found->second;
  return found->second;
}

bool is_guarded_off(const Frame& frame, const Instruction& one) {
  return one.has_guard && (frame.value(one.guard) != 0) == one.guard_is_negated;
}

}  // namespace

void find_instruction(Instruction& instruction) {
  for (const Table& table : {arithmetic_instructions(), synchronisation_instructions(),
                             copy_instructions(), matrix_instructions()}) {
    for (size_t i = 0; i < table.num_rows; ++i) {
      const Row& row = table.rows[i];
      if (instruction.opcode != row.opcode) continue;
      if (instruction.operands.size() != row.num_operands) {
        fail("PTX: %s with %zu operands: %s", row.opcode, instruction.operands.size(),
             instruction.text.c_str());
      }
      instruction.handler = row.handler;
      std::copy(std::begin(row.parameters), std::end(row.parameters), instruction.parameters);
      return;
    }
  }
  if (find_wgmma(instruction)) return;
  fail("PTX that is not emulated: %s", instruction.text.c_str());
}

void run_asm(AsmSite& site, const AsmOperand* operands, int num_operands) {
  current_thread();  // fails outside of kernels
  preemption_point();
  const Program& program = program_of(site);
  Frame frame(site.text, operands, num_operands);
  while (frame.next < static_cast<int>(program.instructions.size())) {
    const Instruction& one = program.instructions[frame.next++];
    if (!is_guarded_off(frame, one)) one.handler(frame, one);
  }
}

}  // namespace drope::emulation

// Whether this text could be executed; emulation_error() says why not.
extern "C" bool emulation_understands(const char* text) {
  try {
    drope::emulation::parse_program(text);
    return true;
  } catch (const std::runtime_error& error) {  // of fail(), outside of a kernel
    drope::emulation::set_error(error.what());
    return false;
  }
}
