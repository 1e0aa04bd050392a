#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "cpu/tiles/serves.h"

namespace drope {

AmxFacts find_amx() {
  const bool in_cpu = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  if (!in_cpu) return {false, 0};
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  const long answer = syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  return {true, answer == 0 ? 0 : errno};
}

}  // namespace drope
