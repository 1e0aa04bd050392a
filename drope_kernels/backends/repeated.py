"""CPU calls that differ from an earlier one in addresses only: nothing is read or chosen again."""

from __future__ import annotations

import torch
from torch import Tensor

from drope_kernels import _C
from drope_kernels.backends.addresses import call_arguments, strided
from drope_kernels.spec.layout import (
    empty_gradients,
    empty_in_order_of,
    empty_lse,
    empty_softmax_state,
)
from drope_kernels.spec.spec import AttentionInputs

Prepared = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class RepeatedCall:
    """One validated dense call without index tensors, for other q, k, v laid out like its own."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self._rotates = inputs.rotation is not None
        q, v = inputs.q, inputs.v
        nothing = q.new_empty(0)  # the operands of the first call are not kept alive
        self._inputs = inputs.with_operands(nothing, nothing, nothing)
        out = empty_in_order_of(q, (*q.shape[:3], v.shape[3]))
        self._out_shape, self._like_q = out.shape, False
        if out.shape == q.shape:
            self._like_q = torch.empty_like(q).stride() == out.stride()
        self._is_contiguous = all(x.is_contiguous() for x in (q, inputs.k, v))
        # Tables of angles stay where they are as long as this call may come again.
        arguments, self._alive = call_arguments(inputs)
        self._forward = _C.RepeatedForward(**arguments, out=strided(out))
        self._backward: _C.RepeatedBackward | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq)."""
        return self._run(q, k, v, 0, 0, 0)

    def forward_for_backward(self, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
        """out, lse, softmax_state, and q and k as backward takes them."""
        softmax_state = empty_softmax_state(q, needed=True)
        if not self._rotates:
            return *self._run(q, k, v, softmax_state.data_ptr(), 0, 0), softmax_state, q, k
        q_prepared, k_prepared = q.new_empty(q.shape), k.new_empty(k.shape)
        kept = (softmax_state.data_ptr(), q_prepared.data_ptr(), k_prepared.data_ptr())
        return *self._run(q, k, v, *kept), softmax_state, q_prepared, k_prepared

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_state: int, q_prepared: int, k_prepared: int
    ) -> tuple[Tensor, Tensor]:
        """out and lse; what backward needs is written to its addresses, unless they are 0."""
        out = torch.empty_like(q) if self._like_q else empty_in_order_of(q, self._out_shape)
        lse = empty_lse(q)
        self._forward.run(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            softmax_state,
            q_prepared,
            k_prepared,
            torch.get_num_threads(),
        )
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        softmax_state: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of what `forward_for_backward` returned for these q, k, v."""
        if grad_out.stride(-1) != 1:  # gradients of sums arrive expanded
            grad_out = grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.contiguous()
        if self._is_contiguous:
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        else:
            grad_q, grad_k, grad_v = empty_gradients(self._inputs.with_operands(q, k, v), out)
        if self._backward is None:
            arguments, alive = call_arguments(self._inputs.with_operands(q, k, v))
            self._alive += alive
            self._backward = _C.RepeatedBackward(
                **arguments,
                out=strided(out),
                grad_out=strided(grad_out),
                softmax_state=0,
                grad_lse=0,
                grad_q=strided(grad_q),
                grad_k=strided(grad_k),
                grad_v=strided(grad_v),
                grad_scale=0,
            )
        self._backward.run(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            out.data_ptr(),
            softmax_state.data_ptr(),
            *strided(grad_out),
            0 if grad_lse is None else grad_lse.data_ptr(),
            grad_q.data_ptr(),
            grad_k.data_ptr(),
            grad_v.data_ptr(),
            torch.get_num_threads(),
        )
        return grad_q, grad_k, grad_v
