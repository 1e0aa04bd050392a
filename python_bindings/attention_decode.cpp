// drope_kernels._C.attention_decode: CPU append and attend on raw addresses.
#include "attention_arguments.h"
#include "bindings.h"
#include "cpu/attention_cpu.h"

namespace py = pybind11;

namespace drope {
namespace {

void attention_decode(const py::kwargs& arguments) {
  CallArguments in(arguments);
  AttentionDecodeParams p;
  read_attention(in, p);  // k and v are the caches
  read_decode(in, p);
  const CpuOptions options{in.value<int>("num_threads")};
  in.finish();
  cpu_kernels();  // reads the environment, which needs the GIL
  py::gil_scoped_release release;
  attention_decode_cpu(p, options);
}

}  // namespace

void register_attention_decode(py::module_& module) {
  module.def("attention_decode", &attention_decode,
             "CPU decode; writes out, lse and the new rows of the caches.");
}

}  // namespace drope
