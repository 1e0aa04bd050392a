// Which calls are for tiles, and whether this machine lets a program use them.
#pragma once

#include <cstdint>
#include <string>

#include "attention_params.h"

namespace drope {

// What of a call decides between tiles and lanes: the same in both passes.
struct TileCall {
  DType dtype;
  int64_t seqlen_q, head_dim, head_dim_v;
  bool softcap;
};

inline TileCall tile_call(const AttentionParams& p) {
  return {p.dtype, p.seqlen_q, p.head_dim, p.head_dim_v, p.softcap > 0.0f};
}

// Why lanes serve a call; null: tiles do.
const char* tiles_refusal(const TileCall& call);

// What a program was told when it looked for AMX.
struct AmxFacts {
  bool in_cpu;     // tiles and their bf16 products, with AVX-512 beside them
  int permission;  // errno of asking the operating system, 0: granted
};

// Asks the CPU and the operating system; which file says it, the build decides.
AmxFacts find_amx();

// Asks once per process; the permission holds for all of its threads, also those to come.
const AmxFacts& amx_facts();

// Why AMX is not used; empty: it can be.
std::string amx_refusal(const AmxFacts& facts);

}  // namespace drope
