// ldmatrix, stmatrix, mma.sync, wgmma.
#include <cstdio>
#include <iterator>

#include "../runtime/machine.h"
#include "../runtime/warp.h"
#include "../runtime/wgmma.h"
#include "frame.h"
#include "instructions.h"

namespace drope::emulation {
namespace {

constexpr int kBF16 = static_cast<int>(ElementType::kBFloat16);
constexpr int kF16 = static_cast<int>(ElementType::kFloat16);

void read_words(const Frame& frame, const Operand& list, uint32_t* words, int num_words) {
  frame.require_list(list, num_words);
  for (int i = 0; i < num_words; ++i) {
    words[i] = static_cast<uint32_t>(frame.value(list.parts[i]));
  }
}

// parameters: number of matrices, is it .trans
void run_ldmatrix(Frame& frame, const Instruction& one) {
  const int num_matrices = one.parameters[0];
  const Operand& list = one.operands[0];
  frame.require_list(list, num_matrices);
  uint32_t words[4];
  ldmatrix(words, num_matrices, one.parameters[1] != 0, frame.shared(one.operands[1]));
  for (int i = 0; i < num_matrices; ++i) frame.set(list.parts[i], words[i]);
}

void run_stmatrix(Frame& frame, const Instruction& one) {
  uint32_t words[4];
  read_words(frame, one.operands[1], words, one.parameters[0]);
  stmatrix(words, one.parameters[0], one.parameters[1] != 0, frame.shared(one.operands[0]));
}

// parameters: ElementType
void run_mma(Frame& frame, const Instruction& one) {
  uint32_t a[4], b[2];
  float c[4], d[4];
  read_words(frame, one.operands[1], a, 4);
  read_words(frame, one.operands[2], b, 2);
  frame.require_list(one.operands[0], 4);
  frame.require_list(one.operands[3], 4);
  for (int i = 0; i < 4; ++i) c[i] = frame.real(one.operands[3].parts[i]);
  mma_m16n8k16(d, a, b, c, static_cast<ElementType>(one.parameters[0]));
  for (int i = 0; i < 4; ++i) frame.set_real(one.operands[0].parts[i], d[i]);
}

void run_wgmma_fence(Frame&, const Instruction&) { wgmma_fence(); }

void run_wgmma_commit(Frame&, const Instruction&) { wgmma_commit_group(); }

void run_wgmma_wait(Frame& frame, const Instruction& one) {
  wgmma_wait_group(frame.integer(one.operands[0]));
}

int sign(const Frame& frame, const Operand& operand) {
  const int value = frame.integer(operand);
  if (value != 1 && value != -1) fail("PTX: imm-scale %d in: %s", value, frame.text);
  return value;
}

bool is_mn_major(const Frame& frame, const Operand& operand) {
  const int value = frame.integer(operand);
  if (value != 0 && value != 1) fail("PTX: transposition %d in: %s", value, frame.text);
  return value == 1;
}

// d, a, b, scale-d, imm-scale-a, imm-scale-b, [trans-a when a is a descriptor,] trans-b.
// parameters: n, ElementType
void run_wgmma(Frame& frame, const Instruction& one) {
  WgmmaShape shape;
  shape.n = one.parameters[0];
  shape.type = static_cast<ElementType>(one.parameters[1]);
  const auto& operands = one.operands;
  shape.a_in_registers = operands[1].kind == Operand::Kind::kList;
  frame.require(one, shape.a_in_registers ? 7 : 8);
  frame.require_list(operands[0], shape.n / 2);
  float* d[kMaxAccumulators];
  for (int i = 0; i < shape.n / 2; ++i) d[i] = frame.accumulator(operands[0].parts[i]);
  uint32_t a[4] = {};
  if (shape.a_in_registers) {
    read_words(frame, operands[1], a, 4);
  } else {
    shape.desc_a = frame.value(operands[1]);
    shape.a_is_mn_major = is_mn_major(frame, operands[6]);
  }
  shape.desc_b = frame.value(operands[2]);
  shape.accumulates = frame.value(operands[3]) != 0;
  shape.sign_a = sign(frame, operands[4]);
  shape.sign_b = sign(frame, operands[5]);
  shape.b_is_mn_major = is_mn_major(frame, operands.back());
  wgmma_mma(shape, d, a);
}

const Row kRows[] = {
    {"ldmatrix.sync.aligned.m8n8.x2.shared.b16", 2, run_ldmatrix, {2, 0}},
    {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", 2, run_ldmatrix, {4, 0}},
    {"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", 2, run_ldmatrix, {2, 1}},
    {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", 2, run_ldmatrix, {4, 1}},
    {"stmatrix.sync.aligned.m8n8.x2.shared.b16", 2, run_stmatrix, {2, 0}},
    {"stmatrix.sync.aligned.m8n8.x4.shared.b16", 2, run_stmatrix, {4, 0}},
    {"stmatrix.sync.aligned.m8n8.x2.trans.shared.b16", 2, run_stmatrix, {2, 1}},
    {"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", 2, run_stmatrix, {4, 1}},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 4, run_mma, {kBF16}},
    {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 4, run_mma, {kF16}},
    {"wgmma.fence.sync.aligned", 0, run_wgmma_fence, {}},
    {"wgmma.commit_group.sync.aligned", 0, run_wgmma_commit, {}},
    {"wgmma.wait_group.sync.aligned", 1, run_wgmma_wait, {}},
};

}  // namespace

Table matrix_instructions() { return {kRows, std::size(kRows)}; }

bool find_wgmma(Instruction& instruction) {
  int n = 0;
  if (std::sscanf(instruction.opcode.c_str(), "wgmma.mma_async.sync.aligned.m64n%d", &n) != 1) {
    return false;
  }
  const std::string head = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k16.f32.";
  const bool is_bf16 = instruction.opcode == head + "bf16.bf16";
  if (!is_bf16 && instruction.opcode != head + "f16.f16") return false;
  instruction.handler = run_wgmma;
  instruction.parameters[0] = n;
  instruction.parameters[1] = is_bf16 ? kBF16 : kF16;
  return instruction.operands.size() == 7 || instruction.operands.size() == 8;
}

}  // namespace drope::emulation
