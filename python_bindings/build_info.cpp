// What was compiled, with what: the facts behind drope_kernels.build_info().
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace drope {
namespace {

std::vector<std::string> split_at_commas(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = DROPE_VERSION;
  info["commit"] = DROPE_COMMIT;
  info["compiler"] = DROPE_COMPILER;
  info["build_type"] = DROPE_BUILD_TYPE;
  info["sanitizers"] = static_cast<bool>(DROPE_SANITIZE);
  info["cpu_isas"] = split_at_commas(DROPE_CPU_ISAS);
  info["cuda"] = py::none();
  info["cuda_architectures"] = std::vector<std::string>();
  return info;
}

}  // namespace

void register_build_info(py::module_& module) {
  module.def("build_info", &build_info,
             "dict: version, commit, compiler, build_type, sanitizers, cpu_isas, cuda, "
             "cuda_architectures (cuda is None in a CPU-only build).");
}

}  // namespace drope
