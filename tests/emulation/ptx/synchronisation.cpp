// Barriers, fences, register counts.
#include <iterator>

#include "../runtime/mbarrier.h"
#include "../runtime/named_barrier.h"
#include "../runtime/shared_memory.h"
#include "../runtime/wgmma.h"
#include "frame.h"
#include "instructions.h"

namespace drope::emulation {
namespace {

void run_bar_sync(Frame& frame, const Instruction& one) {
  bar_sync(frame.integer(one.operands[0]), frame.integer(one.operands[1]));
}

void run_bar_arrive(Frame& frame, const Instruction& one) {
  bar_arrive(frame.integer(one.operands[0]), frame.integer(one.operands[1]));
}

void run_init(Frame& frame, const Instruction& one) {
  mbarrier_init(frame.shared(one.operands[0]), frame.integer(one.operands[1]));
}

void run_invalidate(Frame& frame, const Instruction& one) {
  mbarrier_invalidate(frame.shared(one.operands[0]));
}

void run_arrive(Frame& frame, const Instruction& one) {
  mbarrier_arrive(frame.shared(one.operands[1]));
}

void run_arrive_expect(Frame& frame, const Instruction& one) {
  mbarrier_arrive_expect_tx(frame.shared(one.operands[1]), frame.integer(one.operands[2]));
}

void run_expect(Frame& frame, const Instruction& one) {
  mbarrier_expect_tx(frame.shared(one.operands[0]), frame.integer(one.operands[1]));
}

void run_try_wait(Frame& frame, const Instruction& one) {
  const uint32_t address = frame.shared(one.operands[1]);
  frame.set(one.operands[0], mbarrier_try_wait(address, frame.integer(one.operands[2])));
}

void run_test_wait(Frame& frame, const Instruction& one) {
  const uint32_t address = frame.shared(one.operands[1]);
  frame.set(one.operands[0], mbarrier_test_wait(address, frame.integer(one.operands[2])));
}

void run_fence_init(Frame&, const Instruction&) { fence_mbarrier_init(); }

void run_fence_proxy(Frame&, const Instruction&) { fence_proxy_async(); }

// Global memory has one view here: nothing to do.
void run_nothing(Frame&, const Instruction&) {}

void run_set_max_registers(Frame& frame, const Instruction& one) {
  set_max_registers(frame.integer(one.operands[0]));
}

const Row kRows[] = {
    {"bar.sync", 2, run_bar_sync, {}},
    {"bar.arrive", 2, run_bar_arrive, {}},
    {"mbarrier.init.shared::cta.b64", 2, run_init, {}},
    {"mbarrier.inval.shared::cta.b64", 1, run_invalidate, {}},
    {"mbarrier.arrive.shared::cta.b64", 2, run_arrive, {}},
    {"mbarrier.arrive.expect_tx.shared::cta.b64", 3, run_arrive_expect, {}},
    {"mbarrier.expect_tx.relaxed.cta.shared::cta.b64", 2, run_expect, {}},
    {"mbarrier.try_wait.parity.shared::cta.b64", 3, run_try_wait, {}},
    {"mbarrier.test_wait.parity.shared::cta.b64", 3, run_test_wait, {}},
    {"fence.mbarrier_init.release.cluster", 0, run_fence_init, {}},
    {"fence.proxy.async.shared::cta", 0, run_fence_proxy, {}},
    {"fence.proxy.async.global", 0, run_nothing, {}},
    {"setmaxnreg.inc.sync.aligned.u32", 1, run_set_max_registers, {}},
    {"setmaxnreg.dec.sync.aligned.u32", 1, run_set_max_registers, {}},
};

}  // namespace

Table synchronisation_instructions() { return {kRows, std::size(kRows)}; }

}  // namespace drope::emulation
