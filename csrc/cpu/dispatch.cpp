#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/attention_cpu.h"
#include "cpu/packed.h"
#include "cpu/tiles/serves.h"

namespace drope {

namespace scalar {
extern const CpuKernels kernels;
}
namespace amx_emulated {
extern const CpuKernels kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx512bf16 {
extern const CpuKernels kernels;
}
namespace amx {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool supported;
};

// Best first. To add an instruction set: its vec_<isa>.h, its attention_<isa>.cpp, a line here. The
// emulated tiles are for tests: something better always comes before them.
std::vector<Candidate> candidates() {
  std::vector<Candidate> list;
#ifdef __x86_64__
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  list.push_back({&amx::kernels, has_avx512 && amx_refusal(amx_facts()).empty()});
  const bool dots_first = bf16_dots_come_first(__builtin_cpu_is("intel"));
  if (dots_first) list.push_back({&avx512bf16::kernels, has_bf16});
  list.push_back({&avx512::kernels, has_avx512});
  if (!dots_first) list.push_back({&avx512bf16::kernels, has_bf16});
  list.push_back({&avx2::kernels, has_avx2});
  list.push_back({&scalar::kernels, true});
  list.push_back({&amx_emulated::kernels, has_avx2});
#else
  list.push_back({&scalar::kernels, true});
  list.push_back({&amx_emulated::kernels, true});
#endif
  return list;
}

const CpuKernels& find(const std::string& name, const char* origin) {
  std::string usable;
  bool known = false;
  for (const Candidate& candidate : candidates()) {
    const bool same = name == candidate.kernels->isa;
    if (same && candidate.supported) return *candidate.kernels;
    known = known || same;
    if (candidate.supported)
      usable += (usable.empty() ? "" : ", ") + std::string(candidate.kernels->isa);
  }
  throw std::invalid_argument(std::string(origin) + ": expected one of " + usable + ", got '" +
                              name + "'" + (known ? ", which this CPU cannot run" : "") +
                              "; unset it to use the best one");
}

std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

// On an Emerald Rapids vdpbf16ps does 86 GFLOP/s and a float32 FMA 172; on Zen 5 it does twice as
// much as an FMA.
bool bf16_dots_come_first(bool intel) { return !intel; }

std::vector<const CpuKernels*> supported_cpu_kernels() {
  std::vector<const CpuKernels*> list;
  for (const Candidate& candidate : candidates()) {
    if (candidate.supported) list.push_back(candidate.kernels);
  }
  return list;
}

const CpuKernels& cpu_kernels() {
  if (const CpuKernels* kernels = chosen) return *kernels;
  const char* name = std::getenv("DROPE_CPU_ISA");
  const CpuKernels* kernels = name != nullptr && *name != '\0' ? &find(name, "DROPE_CPU_ISA")
                                                               : supported_cpu_kernels().front();
  chosen = kernels;
  return *kernels;
}

void force_cpu_isa(const std::string& name) {
  chosen = name.empty() ? nullptr : &find(name, "cpu isa");
}

void attention_forward_cpu(const AttentionForwardParams& params, const CpuOptions& options) {
  const auto forward = cpu_kernels().forward;
  if (params.cu_seqlens_q != nullptr) return attend_packed(params, options, forward);
  forward(params, options);
}

void attention_backward_cpu(const AttentionBackwardParams& params, const CpuOptions& options) {
  const auto backward = cpu_kernels().backward;
  if (params.cu_seqlens_q != nullptr) return attend_packed(params, options, backward);
  backward(params, options);
}

void attention_decode_cpu(const AttentionDecodeParams& params, const CpuOptions& options) {
  cpu_kernels().decode(params, options);
}

}  // namespace drope
