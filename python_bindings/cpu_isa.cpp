// Which instruction set the CPU kernels use, and how fast it can multiply and add.
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/attention_cpu.h"
#include "cpu/tiles/serves.h"

namespace py = pybind11;

namespace drope {
namespace {

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : supported_cpu_kernels()) names.emplace_back(kernels->isa);
  return names;
}

double multiply_add_peak(const std::string& isa, int dtype, double seconds) {
  for (const CpuKernels* kernels : supported_cpu_kernels()) {
    if (isa == kernels->isa) {
      py::gil_scoped_release release;
      return kernels->multiply_add_peak(static_cast<DType>(dtype), seconds);
    }
  }
  throw std::invalid_argument("isa: expected one of cpu_isas(), got '" + isa + "'");
}

// Which kernels in use serve a call of this kind.
std::string cpu_kernels_for(int dtype, int64_t seqlen_q, int64_t head_dim, int64_t head_dim_v,
                            bool softcap, bool decode) {
  const CpuKernels& kernels = cpu_kernels();
  if (kernels.lanes_isa == nullptr) return std::string(kernels.isa) + " lanes";
  const char* refusal =
      decode ? "decode reads each key once"
             : tiles_refusal({static_cast<DType>(dtype), seqlen_q, head_dim, head_dim_v, softcap});
  if (refusal == nullptr) return std::string(kernels.isa) + " tiles";
  return std::string(kernels.lanes_isa) + " lanes, not " + kernels.isa + " tiles: " + refusal;
}

}  // namespace

void register_cpu_isa(py::module_& module) {
  module.def("cpu_isas", &cpu_isas, "Instruction sets that this CPU can run, best first.");
  module.def(
      "cpu_isa", [] { return cpu_kernels().isa; },
      "The instruction set in use: forced, from DROPE_CPU_ISA, or the best. ValueError if the "
      "forced one is unknown or cannot run here.");
  module.def("bf16_dots_come_first", &bf16_dots_come_first, py::arg("intel"),
             "Whether avx512bf16 comes before avx512 on a CPU that has both.");
  module.def("set_cpu_isa", &force_cpu_isa, py::arg("name"),
             "Forces an instruction set; '' returns to DROPE_CPU_ISA or the best.");
  module.def("cpu_kernels_for", &cpu_kernels_for, py::arg("dtype"), py::arg("seqlen_q"),
             py::arg("head_dim"), py::arg("head_dim_v"), py::arg("softcap"), py::arg("decode"),
             "Which kernels of the instruction set in use serve a call: lanes or tiles, and why.");
  module.def(
      "amx_refusal", [] { return amx_refusal(amx_facts()); },
      "Why this machine does not use AMX tiles; '' if it can.");
  module.def(
      "amx_refusal", [](bool in_cpu, int permission) { return amx_refusal({in_cpu, permission}); },
      py::arg("in_cpu"), py::arg("permission"),
      "The same for a machine that shows tiles or does not, and errno of asking for them.");
  module.def("fma_peak", &multiply_add_peak, py::arg("isa"), py::arg("dtype"), py::arg("seconds"),
             "Measured register-resident multiply-adds in flop/s of thread CPU time.");
}

}  // namespace drope
