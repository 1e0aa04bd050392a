"""When a call may go past torch's dispatcher: plain tensors, and nobody who listens to ops.

The dispatcher costs several times what a small call computes. What it would do for such a call is
nothing: no mode or transform rewrites it, no trace, compiler or profiler records it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TYPES = (Tensor, torch.nn.Parameter)


def nobody_listens() -> bool:
    """Whether no mode, transform, trace, compiler or profiler would see an op."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


@cache
def _keys_of_plain_tensors(device: torch.device) -> frozenset[int]:
    """Dispatch keys of ordinary tensors with memory, made inside and outside of inference mode."""
    if device.type not in ("cpu", "cuda"):
        return frozenset()
    kinds = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            kinds.append(torch.empty(0, device=device))
    return frozenset(torch._C._dispatch_keys(x).raw_repr() for x in kinds)


def are_plain(tensors: Iterable[Any]) -> bool:
    """Whether those of `tensors` that are tensors hold their numbers as they are.

    No subclass, and no view that is negated or conjugated when it is read.
    """
    return all(
        type(x) in _TYPES
        and torch._C._dispatch_keys(x).raw_repr() in _keys_of_plain_tensors(x.device)
        for x in tensors
        if isinstance(x, Tensor)
    )


def may_go_directly(arguments: tuple[Any, ...]) -> bool:
    """Whether an op with these arguments may be its Python function instead."""
    return nobody_listens() and are_plain(arguments)
