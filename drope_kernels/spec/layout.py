"""Memory order of results: laid out like the tensors they belong to, on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drope_kernels.spec.spec import AttentionInputs


def is_aligned(x: Tensor) -> bool:
    """Whether x (B, H, S, X) starts at a multiple of 16 bytes, and so does each of its rows."""
    if x.data_ptr() % 16:
        return False
    unit = 16 // x.element_size()
    batch, head, row, _ = x.stride()
    if not (batch % unit or head % unit or row % unit):
        return True
    # A step that nobody takes may be anything.
    return not any(
        step % unit and size > 1 for step, size in zip((batch, head, row), x.shape[:3], strict=True)
    )


def empty_in_order_of(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised (B, H, S, X) tensor in the memory order of `like`, a (B, H, S, Y) tensor.

    A transposed view of (B, S, H, Y) memory gives (B, S, H, X) memory; anything else, expanded
    tensors included, gives plain contiguous memory. Kernels and fakes share this rule.
    """
    batch, heads, rows, channels = shape
    if 0 < like.stride(1) < like.stride(2):
        return like.new_empty((batch, rows, heads, channels)).transpose(1, 2)
    return like.new_empty((batch, heads, rows, channels))


def empty_gradients(inputs: AttentionInputs, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dq, dk, dv of a backward call, for backends and fakes.

    Prepared q and k are contiguous whatever the caller's were: there dq follows out, which follows
    q, and dk follows v.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    q_order, k_order = (q, k) if inputs.rotation is None else (out, v)
    return (
        empty_in_order_of(q_order, q.shape),
        empty_in_order_of(k_order, k.shape),
        empty_in_order_of(v, v.shape),
    )


def empty_grad_scale(inputs: AttentionInputs, *, needed: bool) -> Tensor:
    """An uninitialised dscale (B, Hq, Sq) in the scale's dtype, size 0 if not needed."""
    q, scale = inputs.q, inputs.scale
    if needed and isinstance(scale, Tensor):
        return q.new_empty(q.shape[:3], dtype=scale.dtype)
    return q.new_empty((0,), dtype=row_dtype(q))


def row_dtype(q: Tensor) -> torch.dtype:
    """Of numbers that each query has one of, such as lse: float32, for float64 inputs float64."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_lse(q: Tensor) -> Tensor:
    """An uninitialised lse (B, Hq, Sq)."""
    return q.new_empty(q.shape[:3], dtype=row_dtype(q))


def empty_softmax_state(q: Tensor, *, needed: bool) -> Tensor:
    """An uninitialised softmax_state (2, B, Hq, Sq), what backward knows of each row; else size 0.

    [0] is a, the largest score t that the row saw (or one within 8 octaves of it), before the
    factor c' that makes it an exponent; 0 where the row saw no key. [1] is L, the logarithm to base
    2 of the row's sum of 2 ** (c' (t - a)); +inf where it saw no key.
    """
    return q.new_empty((2, *q.shape[:3]) if needed else (0,), dtype=row_dtype(q))
