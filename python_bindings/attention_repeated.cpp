// drope_kernels._C.RepeatedForward, RepeatedBackward: CPU calls whose arguments are read once, for
// many calls that differ in addresses only. Reading them costs more than a small call computes.
#include "attention_arguments.h"
#include "bindings.h"
#include "cpu/attention_cpu.h"

namespace py = pybind11;

namespace drope {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

class RepeatedForward {
 public:
  explicit RepeatedForward(const py::kwargs& arguments) {
    CallArguments in(arguments);
    read_attention(in, p_);
    in.tensor("out", p_.out, p_.stride_out_batch, p_.stride_out_head, p_.stride_out_row);
    in.finish();
  }

  // Addresses; 0 for softmax_state and the prepared rows where they are not kept.
  void run(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse,
           uintptr_t softmax_state, uintptr_t q_prepared, uintptr_t k_prepared,
           int num_threads) const {
    AttentionForwardParams p = p_;
    p.q = at<const void>(q);
    p.k = at<const void>(k);
    p.v = at<const void>(v);
    p.out = at<void>(out);
    p.lse = at<float>(lse);
    p.softmax_state = at<float>(softmax_state);
    p.q_prepared = at<void>(q_prepared);
    p.k_prepared = at<void>(k_prepared);
    cpu_kernels();  // reads the environment, which needs the GIL
    py::gil_scoped_release release;
    attention_forward_cpu(p, {num_threads});
  }

 private:
  AttentionForwardParams p_;
};

class RepeatedBackward {
 public:
  explicit RepeatedBackward(const py::kwargs& arguments) {
    CallArguments in(arguments);
    read_attention(in, p_);
    read_gradients(in, p_);
    in.finish();
  }

  // grad_lse 0: zero. Strides of grad_out are the caller's, all others those of the first call.
  void run(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t softmax_state,
           uintptr_t grad_out, int64_t stride_batch, int64_t stride_head, int64_t stride_row,
           uintptr_t grad_lse, uintptr_t grad_q, uintptr_t grad_k, uintptr_t grad_v,
           int num_threads) const {
    AttentionBackwardParams p = p_;
    p.q = at<const void>(q);
    p.k = at<const void>(k);
    p.v = at<const void>(v);
    p.out = at<const void>(out);
    p.softmax_state = at<const float>(softmax_state);
    p.grad_out = at<const void>(grad_out);
    p.stride_grad_out_batch = stride_batch;
    p.stride_grad_out_head = stride_head;
    p.stride_grad_out_row = stride_row;
    p.grad_lse = at<const float>(grad_lse);
    p.grad_q = at<void>(grad_q);
    p.grad_k = at<void>(grad_k);
    p.grad_v = at<void>(grad_v);
    cpu_kernels();  // reads the environment, which needs the GIL
    py::gil_scoped_release release;
    attention_backward_cpu(p, {num_threads});
  }

 private:
  AttentionBackwardParams p_;
};

}  // namespace

void register_attention_repeated(py::module_& module) {
  py::class_<RepeatedForward>(module, "RepeatedForward",
                              "The CPU forward pass for many calls that differ in addresses.")
      .def(py::init<const py::kwargs&>())
      .def("run", &RepeatedForward::run);
  py::class_<RepeatedBackward>(module, "RepeatedBackward",
                               "The CPU backward pass for many calls that differ in addresses.")
      .def(py::init<const py::kwargs&>())
      .def("run", &RepeatedBackward::run);
}

}  // namespace drope
