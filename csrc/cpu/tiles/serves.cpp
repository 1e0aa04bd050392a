#include "cpu/tiles/serves.h"

#include <cerrno>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace drope {

namespace {

constexpr int64_t kMaxTileHeadDim = 128;
constexpr int64_t kMinTileQueries = 16;

AmxFacts find_amx() {
#if defined(__x86_64__) && defined(__linux__)
  const bool in_cpu = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  if (!in_cpu) return {false, 0};
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  const long answer = syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  return {true, answer == 0 ? 0 : errno};
#else
  return {false, 0};
#endif
}

}  // namespace

const char* tiles_refusal(const TileCall& call) {
  if (call.dtype != DType::kBFloat16) return "tiles multiply bfloat16 only";
  if (call.head_dim > kMaxTileHeadDim || call.head_dim_v > kMaxTileHeadDim)
    return "tiles are for head_dim up to 128";
  if (call.softcap) return "tiles have no softcap";
  if (call.seqlen_q < kMinTileQueries) return "fewer than 16 queries would leave tiles empty";
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
