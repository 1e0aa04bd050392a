#include "cpu/tiles/serves.h"

#include <cstring>

namespace drope {

namespace {

constexpr int64_t kMaxTileHeadDim = 128;
constexpr int64_t kMinTileQueries = 8;

}  // namespace

const char* tiles_refusal(const TileCall& call) {
  if (call.dtype != DType::kBFloat16) return "tiles multiply bfloat16 only";
  if (call.head_dim > kMaxTileHeadDim || call.head_dim_v > kMaxTileHeadDim)
    return "tiles are for head_dim up to 128";
  if (call.softcap) return "tiles have no softcap";
  if (call.seqlen_q < kMinTileQueries) return "fewer than 8 queries would leave tiles empty";
  return nullptr;
}

const AmxFacts& amx_facts() {
  static const AmxFacts facts = find_amx();
  return facts;
}

std::string amx_refusal(const AmxFacts& facts) {
  if (!facts.in_cpu)
    return "this CPU, or the machine that emulates it, shows no AMX tiles (amx_tile, amx_bf16)";
  if (facts.permission != 0)
    return std::string(
               "the operating system does not let this process use AMX tiles "
               "(arch_prctl(ARCH_REQ_XCOMP_PERM): ") +
           std::strerror(facts.permission) + ")";
  return "";
}

}  // namespace drope
