// drope_kernels._C.cuda_attention_decode: append and attend on device addresses.
#include "cuda_arguments.h"

namespace py = pybind11;

namespace drope {
namespace {

void cuda_attention_decode(const py::kwargs& arguments) {
  CallArguments in(arguments);
  AttentionDecodeParams p;
  read_attention(in, p);  // k and v are the caches
  read_decode(in, p);
  CudaLaunch launch(in);
  in.finish();
  launch.run(p, &cuda::attention_decode_workspace_bytes, &cuda::attention_decode_cuda);
}

}  // namespace

void register_cuda_attention_decode(py::module_& module) {
  module.def("cuda_attention_decode", &cuda_attention_decode,
             "CUDA decode, asynchronous on the stream; writes out, lse and the new rows of the "
             "caches.");
}

}  // namespace drope
