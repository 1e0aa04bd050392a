// cp.async, bulk and tensor copies, reductions in global memory.
#include <iterator>

#include "../runtime/bulk_copy.h"
#include "../runtime/cp_async.h"
#include "../runtime/device_memory.h"
#include "../runtime/machine.h"
#include "frame.h"
#include "instructions.h"

namespace drope::emulation {
namespace {

void run_cp_async(Frame& frame, const Instruction& one) {
  if (frame.integer(one.operands[2]) != 16) fail("cp.async.cg copies 16 bytes: %s", frame.text);
  cp_async_16(frame.shared(one.operands[0]), frame.global(one.operands[1]),
              frame.integer(one.operands[3]));
}

void run_commit(Frame&, const Instruction&) { cp_async_commit_group(); }

void run_wait(Frame& frame, const Instruction& one) {
  cp_async_wait_group(frame.integer(one.operands[0]));
}

void run_bulk_load(Frame& frame, const Instruction& one) {
  bulk_load(frame.shared(one.operands[0]), frame.global(one.operands[1]),
            frame.integer(one.operands[2]), frame.shared(one.operands[3]));
}

// parameters: StoreKind
void run_bulk_store(Frame& frame, const Instruction& one) {
  bulk_store(frame.global(one.operands[0]), frame.shared(one.operands[1]),
             frame.integer(one.operands[2]), static_cast<StoreKind>(one.parameters[0]));
}

void run_bulk_commit(Frame&, const Instruction&) { bulk_commit_group(); }

// parameters: is it .read
void run_bulk_wait(Frame& frame, const Instruction& one) {
  bulk_wait_group(frame.integer(one.operands[0]), one.parameters[0] != 0);
}

// [map, {coordinates}]; fails unless there are `rank`.
const void* read_tensor_address(const Frame& frame, const Operand& address, int rank, int* start) {
  if (address.kind != Operand::Kind::kAddress || address.parts.size() != 2 ||
      address.parts[1].parts.size() != static_cast<size_t>(rank)) {
    fail("PTX: no tensor address of rank %d in: %s", rank, frame.text);
  }
  for (int i = 0; i < rank; ++i) start[i] = frame.integer(address.parts[1].parts[i]);
  return frame.global(address);
}

// parameters: rank
void run_tensor_load(Frame& frame, const Instruction& one) {
  const int rank = one.parameters[0];
  int start[kMaxRank];
  const void* map = read_tensor_address(frame, one.operands[1], rank, start);
  tensor_load(frame.shared(one.operands[0]), map, start, rank, frame.shared(one.operands[2]));
}

// parameters: rank, is it a reduction
void run_tensor_store(Frame& frame, const Instruction& one) {
  const int rank = one.parameters[0];
  int start[kMaxRank];
  const void* map = read_tensor_address(frame, one.operands[0], rank, start);
  tensor_store(map, frame.shared(one.operands[1]), start, rank, one.parameters[1] != 0);
}

void run_prefetch(Frame& frame, const Instruction& one) {
  as_tensor_map(frame.global(one.operands[0]));
}

// parameters: floats per instruction
void run_red_add(Frame& frame, const Instruction& one) {
  const int num_floats = one.parameters[0];
  const Operand& source = one.operands[1];
  float values[4];
  if (num_floats == 1) {
    values[0] = frame.real(source);
  } else {
    frame.require_list(source, num_floats);
    for (int i = 0; i < num_floats; ++i) values[i] = frame.real(source.parts[i]);
  }
  add_global(static_cast<float*>(frame.global(one.operands[0])), values, num_floats);
}

constexpr int kWrite = static_cast<int>(StoreKind::kWrite);
constexpr int kAddFloat32 = static_cast<int>(StoreKind::kAddFloat32);

const Row kRows[] = {
    {"cp.async.cg.shared.global", 4, run_cp_async, {}},
    {"cp.async.commit_group", 0, run_commit, {}},
    {"cp.async.wait_group", 1, run_wait, {}},
    {"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", 4, run_bulk_load, {}},
    {"cp.async.bulk.global.shared::cta.bulk_group", 3, run_bulk_store, {kWrite}},
    {"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32",
     3,
     run_bulk_store,
     {kAddFloat32}},
    {"cp.async.bulk.commit_group", 0, run_bulk_commit, {}},
    {"cp.async.bulk.wait_group", 1, run_bulk_wait, {0}},
    {"cp.async.bulk.wait_group.read", 1, run_bulk_wait, {1}},
    {"cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes",
     3,
     run_tensor_load,
     {2}},
    {"cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes",
     3,
     run_tensor_load,
     {3}},
    {"cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes",
     3,
     run_tensor_load,
     {4}},
    {"cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group", 2, run_tensor_store, {2}},
    {"cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group", 2, run_tensor_store, {3}},
    {"cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group", 2, run_tensor_store, {4}},
    {"cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group",
     2,
     run_tensor_store,
     {2, 1}},
    {"cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group",
     2,
     run_tensor_store,
     {3, 1}},
    {"cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group",
     2,
     run_tensor_store,
     {4, 1}},
    {"red.global.add.f32", 2, run_red_add, {1}},
    {"red.global.add.v2.f32", 2, run_red_add, {2}},
    {"red.global.add.v4.f32", 2, run_red_add, {4}},
    {"prefetch.tensormap", 1, run_prefetch, {}},
};

}  // namespace

Table copy_instructions() { return {kRows, std::size(kRows)}; }

}  // namespace drope::emulation
