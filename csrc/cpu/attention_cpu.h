// The CPU kernels and the choice of their instruction set.
#pragma once

#include <string>
#include <vector>

#include "attention_params.h"

namespace drope {

struct CpuOptions {
  int num_threads = 1;  // at most; small calls use fewer
};

// They throw std::bad_alloc when working memory, O(seqlen * head_dim), cannot be had.
void attention_forward_cpu(const AttentionForwardParams& params, const CpuOptions& options);
void attention_backward_cpu(const AttentionBackwardParams& params, const CpuOptions& options);
// Every row has room for its new keys and its pages exist: nothing is checked here. num_splits and
// the partial results of the parameters are not used.
void attention_decode_cpu(const AttentionDecodeParams& params, const CpuOptions& options);

// One compiled instance of the kernels.
struct CpuKernels {
  const char* isa;
  // Of tile kernels: the instance of lanes that serves what tiles do not. Null: this one is lanes.
  const char* lanes_isa;
  void (*forward)(const AttentionForwardParams&, const CpuOptions&);
  void (*backward)(const AttentionBackwardParams&, const CpuOptions&);
  void (*decode)(const AttentionDecodeParams&, const CpuOptions&);
  // Measured register-resident multiply-adds of this instance, in flop/s of thread CPU time.
  double (*multiply_add_peak)(DType dtype, double seconds);
};

// Whether bf16 dot products of vectors are preferred to float32 multiply-adds: of what is known of
// CPUs that have both, a fact of who made them.
bool bf16_dots_come_first(bool intel);

// Instances that this machine can run, best first.
std::vector<const CpuKernels*> supported_cpu_kernels();

// The instance in use: the one forced by force_cpu_isa or DROPE_CPU_ISA, else the best. Throws
// std::invalid_argument if the forced one is unknown or cannot run here. DROPE_CPU_ISA is read
// until a choice succeeds, then the choice stays.
const CpuKernels& cpu_kernels();

// Forces an instance by name from now on; an empty name returns to DROPE_CPU_ISA or the best.
void force_cpu_isa(const std::string& name);

}  // namespace drope
