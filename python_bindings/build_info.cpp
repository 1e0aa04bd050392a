// What was compiled, with what: the facts behind drope_kernels.build_info().
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bindings.h"
#include "build_facts.h"

namespace py = pybind11;

namespace drope {
namespace {

// CMake's lists are one string.
std::vector<std::string> split_at_semicolons(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ';');) parts.push_back(part);
  return parts;
}

py::object none_if_empty(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

py::dict build_info() {
  py::dict info;
  info["version"] = build_facts::kVersion;
  info["commit"] = build_facts::kCommit;
  info["compiler"] = build_facts::kCompiler;
  info["build_type"] = build_facts::kBuildType;
  info["sanitizers"] = build_facts::kSanitizers;
  info["cpu_isas"] = split_at_semicolons(build_facts::kCpuIsas);
  info["cuda"] = none_if_empty(build_facts::kCudaVersion);
  info["cuda_architectures"] = split_at_semicolons(build_facts::kCudaArchitectures);
  info["no_cuda_reason"] = none_if_empty(build_facts::kNoCudaReason);
  return info;
}

}  // namespace

void register_build_info(py::module_& module) {
  module.def("build_info", &build_info,
             "dict: version, commit, compiler, build_type, sanitizers, cpu_isas, cuda, "
             "cuda_architectures, no_cuda_reason (cuda is None in a CPU-only build, and "
             "no_cuda_reason says why it is one).");
}

}  // namespace drope
