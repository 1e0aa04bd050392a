// One instance of the kernels, in the namespace that DROPE_ISA names.
#pragma once

#include "cpu/attention_cpu.h"
#include "cpu/lanes/backward.h"
#include "cpu/lanes/decode.h"
#include "cpu/lanes/forward.h"
#include "cpu/lanes/peak.h"

#define DROPE_NAME_OF(isa) DROPE_TEXT(isa)
#define DROPE_TEXT(text) #text

namespace drope::DROPE_ISA {

extern const CpuKernels kernels;
const CpuKernels kernels = {DROPE_NAME_OF(DROPE_ISA), nullptr, forward, backward, decode, multiply_add_peak};

}  // namespace drope::DROPE_ISA
