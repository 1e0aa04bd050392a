// Arithmetic, conversion, predicates, control flow.
#include <cmath>
#include <iterator>

#include "../runtime/machine.h"
#include "../runtime/warp.h"
#include "frame.h"
#include "instructions.h"

namespace drope::emulation {
namespace {

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

void run_ex2_ftz(Frame& frame, const Instruction& one) {
  frame.set_real(one.operands[0], flushed(std::exp2(flushed(frame.real(one.operands[1])))));
}

void run_lg2_ftz(Frame& frame, const Instruction& one) {
  frame.set_real(one.operands[0], std::log2(flushed(frame.real(one.operands[1]))));
}

// The first source fills the upper half.
void run_convert_pair(Frame& frame, const Instruction& one) {
  const auto type = static_cast<ElementType>(one.parameters[0]);
  const uint32_t upper = from_float(frame.real(one.operands[1]), type);
  const uint32_t lower = from_float(frame.real(one.operands[2]), type);
  frame.set(one.operands[0], upper << 16 | lower);
}

void run_widen_f16(Frame& frame, const Instruction& one) {
  const auto half = static_cast<uint16_t>(frame.value(one.operands[1]));
  frame.set_real(one.operands[0], to_float(half, ElementType::kFloat16));
}

void run_select(Frame& frame, const Instruction& one) {
  const bool is_first = frame.value(one.operands[3]) != 0;
  frame.set(one.operands[0], frame.value(one.operands[is_first ? 1 : 2]));
}

void run_move(Frame& frame, const Instruction& one) {
  frame.set(one.operands[0], frame.value(one.operands[1]));
}

void run_not_equal(Frame& frame, const Instruction& one) {
  frame.set(one.operands[0], frame.integer(one.operands[1]) != frame.integer(one.operands[2]));
}

void run_equal(Frame& frame, const Instruction& one) {
  frame.set(one.operands[0], frame.integer(one.operands[1]) == frame.integer(one.operands[2]));
}

void run_branch(Frame& frame, const Instruction& one) { frame.next = one.target; }

void run_elect(Frame& frame, const Instruction& one) {
  if (static_cast<uint32_t>(frame.value(one.operands[1])) != 0xffffffffu) {
    fail("elect.sync: partial masks are not emulated");
  }
  const Operand& pair = one.operands[0];
  frame.set(pair.parts[0], 0);
  frame.set(pair.parts[1], elect());
}

constexpr int kBF16 = static_cast<int>(ElementType::kBFloat16);
constexpr int kF16 = static_cast<int>(ElementType::kFloat16);

const Row kRows[] = {
    {"ex2.approx.ftz.f32", 2, run_ex2_ftz, {}},
    {"lg2.approx.ftz.f32", 2, run_lg2_ftz, {}},
    {"cvt.rn.bf16x2.f32", 3, run_convert_pair, {kBF16}},
    {"cvt.rn.f16x2.f32", 3, run_convert_pair, {kF16}},
    {"cvt.f32.f16", 2, run_widen_f16, {}},
    {"selp.u32", 4, run_select, {}},
    {"selp.b32", 4, run_select, {}},
    {"mov.u32", 2, run_move, {}},
    {"mov.b32", 2, run_move, {}},
    {"setp.ne.b32", 3, run_not_equal, {}},
    {"setp.eq.b32", 3, run_equal, {}},
    {"bra", 0, run_branch, {}},
    {"elect.sync", 2, run_elect, {}},
};

}  // namespace

Table arithmetic_instructions() { return {kRows, std::size(kRows)}; }

}  // namespace drope::emulation
