// One instance of the tile kernels, in the namespace that DROPE_ISA names. DROPE_LANES names the
// instance of lanes that serves the other calls.
#pragma once

#include "cpu/attention_cpu.h"
#include "cpu/tiles/backward.h"
#include "cpu/tiles/forward.h"
#include "cpu/tiles/serves.h"

#define DROPE_NAME_OF(isa) DROPE_TEXT(isa)
#define DROPE_TEXT(text) #text

namespace drope {

namespace DROPE_LANES {
extern const CpuKernels kernels;
}

namespace DROPE_ISA {

inline void forward_or_lanes(const AttentionForwardParams& params, const CpuOptions& options) {
  if (tiles_refusal(tile_call(params)) == nullptr) return forward_on_tiles(params, options);
  DROPE_LANES::kernels.forward(params, options);
}

inline void backward_or_lanes(const AttentionBackwardParams& params, const CpuOptions& options) {
  if (tiles_refusal(tile_call(params)) == nullptr) return backward_on_tiles(params, options);
  DROPE_LANES::kernels.backward(params, options);
}

// Decode reads each key once: nothing for tiles to do.
inline void decode_by_lanes(const AttentionDecodeParams& params, const CpuOptions& options) {
  DROPE_LANES::kernels.decode(params, options);
}

inline double multiply_add_peak(DType dtype, double seconds) {
  return DROPE_LANES::kernels.multiply_add_peak(dtype, seconds);
}

extern const CpuKernels kernels;
const CpuKernels kernels = {DROPE_ISA_NAME, DROPE_NAME_OF(DROPE_LANES), forward_or_lanes, backward_or_lanes, decode_by_lanes,
                            multiply_add_peak};

}  // namespace DROPE_ISA
}  // namespace drope
