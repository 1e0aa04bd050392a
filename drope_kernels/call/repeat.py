"""Calls like an earlier one: what was checked and chosen for that one holds for this one too.

Everything that checks and selection look at is in the key of a call: shapes, strides, dtypes, the
kind of the tensors, and each option. A call that is found goes straight to its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from drope_kernels.call import ops
from drope_kernels.call.direct import are_plain, nobody_listens
from drope_kernels.call.dispatch import select
from drope_kernels.rope import Rope

_MOST = 512  # of calls that are remembered; then all are forgotten


class Repeated(Protocol):
    """What a backend makes of a call that may come again."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    forward_for_backward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]


class _Known:
    """A call by its key, and what its operands were computed with."""

    def __init__(self, repeated: Repeated, call: tuple[Any, ...], rope: Rope | bool) -> None:
        self.repeated, self.rope = repeated, rope  # the rope lives: its id is in the key
        self.shared, self.backend = call[3:-2], call[-1]


_known: dict[tuple[Any, ...], _Known | None] = {}


def key_of(
    q: Any,
    k: Any,
    v: Any,
    rope: Rope | bool,
    causal: bool,
    scale: Any,
    window: Any,
    softcap: Any,
    q_start: Any,
    backend: str,
) -> tuple[Any, ...] | None:
    """What the call has to have in common with an earlier one; None where that does not suffice.

    Types are exact: True and 1.0 would be found under the key of 1.
    """
    if not (
        type(q) is type(k) is type(v) is Tensor
        and q.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and type(causal) is bool
        and (type(rope) is bool or type(rope) is Rope)
        and (scale is None or type(scale) is float)
        and (window is None or type(window) is int)
        and (softcap is None or type(softcap) is float)
        and (q_start is None or type(q_start) is int)
        and nobody_listens()
    ):
        return None
    kind = torch._C._dispatch_keys
    return (
        q.shape,
        k.shape,
        v.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        q.dtype,
        k.dtype,
        v.dtype,
        kind(q).raw_repr(),
        kind(k).raw_repr(),
        kind(v).raw_repr(),
        k.is_cpu and v.is_cpu,
        rope if type(rope) is bool else id(rope),
        type(rope),
        causal,
        scale,
        window,
        softcap,
        q_start,
        backend,
    )


def attend_again(key: tuple[Any, ...], q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor] | None:
    """out and lse of a call whose key is known; None if it is not."""
    known = _known.get(key)
    if known is None:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        results: tuple[Tensor, Tensor] = _Again.apply(q, k, v, known)
        return results
    return known.repeated.forward(q, k, v)


def remember(key: tuple[Any, ...], call: tuple[Any, ...], rope: Rope | bool) -> None:
    """That the call with these arguments of the op was served, if its backend can repeat it."""
    if key in _known or not are_plain(call):
        return
    if len(_known) >= _MOST:
        _known.clear()
    inputs = ops.gather_inputs(*call[:-2])
    backend = select(ops.spec_of(inputs, needs_grad=True), call[-1])
    repeated = backend.repeated(inputs)
    _known[key] = None if repeated is None else _Known(repeated, call, rope)


def forget_all() -> None:
    """Calls are checked and backends chosen anew: backends or instruction sets have changed."""
    _known.clear()


class _Again(torch.autograd.Function):
    """`ops._Attention` for a known call."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, known: _Known) -> tuple[Tensor, Tensor]:
        out, lse, softmax_state, q, k = known.repeated.forward_for_backward(q, k, v)
        ctx.save_for_backward(out, softmax_state, q, k, v)
        ctx.set_materialize_grads(False)
        ctx.known = known
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        out, softmax_state, q, k, v = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        operands = (grad_out, grad_lse, out, softmax_state, q, k, v)
        # A gradient of these gradients is refused by the op's own autograd kernel.
        if torch.is_grad_enabled() or not (nobody_listens() and are_plain(operands[:2])):
            shared, backend = ctx.known.shared, ctx.known.backend
            dq, dk, dv, *_ = ops.attention_bwd(*operands, *shared, False, False, backend)
        else:
            dq, dk, dv = ctx.known.repeated.backward(*operands)
        return dq, dk, dv, None
