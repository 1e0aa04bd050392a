// Which instruction set the CPU kernels use, and how fast it can multiply and add.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/attention_cpu.h"

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

}  // namespace

void register_cpu_isa(py::module_& module) {
  module.def("cpu_isas", &cpu_isas, "Instruction sets that this CPU can run, best first.");
  module.def(
      "cpu_isa", [] { return cpu_kernels().isa; },
      "The instruction set in use: forced, from DROPE_CPU_ISA, or the best. ValueError if the "
      "forced one is unknown or cannot run here.");
  module.def("set_cpu_isa", &force_cpu_isa, py::arg("name"),
             "Forces an instruction set; '' returns to DROPE_CPU_ISA or the best.");
  module.def("fma_peak", &multiply_add_peak, py::arg("isa"), py::arg("dtype"), py::arg("seconds"),
             "Measured register-resident multiply-adds in flop/s of thread CPU time.");
}

}  // namespace drope
