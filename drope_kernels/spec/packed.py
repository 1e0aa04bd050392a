"""Packed (varlen) calls for backends whose kernels see one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from drope_kernels.spec.layout import (
    empty_grad_scale,
    empty_gradients,
    empty_in_order_of,
    empty_lse,
    empty_softmax_state,
)
from drope_kernels.spec.spec import AttentionInputs, DecodeInputs

ForwardResults = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Forward(Protocol):
    """The forward of a backend: out, lse and what backward needs, softmax_state and q' and k'.

    softmax_state is (2, B, Hq, Sq) as in `empty_softmax_state`; it has size 0 unless save_prepared,
    q' and k' also where the call does not rotate.
    """

    def __call__(self, inputs: AttentionInputs, *, save_prepared: bool) -> ForwardResults: ...


class Backward(Protocol):
    """The backward of a backend: dq, dk, dv, and dscale (size 0 unless asked for)."""

    def __call__(
        self,
        inputs: AttentionInputs,
        out: Tensor,
        softmax_state: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        *,
        need_grad_scale: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


class Decode(Protocol):
    """The decode of a backend: out (B, Hq, Sq, Dv) and lse, caches written."""

    def __call__(self, inputs: DecodeInputs) -> tuple[Tensor, Tensor]: ...


def segments(inputs: AttentionInputs) -> Iterator[tuple[slice, slice, AttentionInputs]]:
    """The sequences of a packed call: query rows, key rows, and the call restricted to them.

    The last query of a sequence sits at its last key: q_start = Skv - Sq of that sequence.
    """
    assert inputs.cu_seqlens_q is not None
    assert inputs.cu_seqlens_k is not None
    spans_q = pairwise(inputs.cu_seqlens_q.tolist())
    spans_k = pairwise(inputs.cu_seqlens_k.tolist())
    for (q_begin, q_end), (k_begin, k_end) in zip(spans_q, spans_k, strict=True):
        rows, keys = slice(q_begin, q_end), slice(k_begin, k_end)
        rotation = inputs.rotation
        if rotation is not None:
            positions, kv_positions = rotation.positions, rotation.kv_positions
            rotation = replace(
                rotation,
                positions=None if positions is None else positions[:, rows],
                kv_positions=None if kv_positions is None else kv_positions[:, keys],
            )
        scale = inputs.scale
        yield (
            rows,
            keys,
            replace(
                inputs,
                q=inputs.q[:, :, rows],
                k=inputs.k[:, :, keys],
                v=inputs.v[:, :, keys],
                scale=scale[:, :, rows] if isinstance(scale, Tensor) else scale,
                q_start=(k_end - k_begin) - (q_end - q_begin),
                rotation=rotation,
                cu_seqlens_q=None,
                cu_seqlens_k=None,
            ),
        )


def join_forward(
    inputs: AttentionInputs, forward: Forward, *, save_prepared: bool
) -> ForwardResults:
    """`forward` of each sequence, written into the packed results."""
    q, k, v = inputs.q, inputs.k, inputs.v
    keep = save_prepared and inputs.rotation is not None
    out = empty_in_order_of(q, (*q.shape[:3], v.shape[3]))
    lse = empty_lse(q)
    softmax_state = empty_softmax_state(q, needed=save_prepared)
    q_prepared = q.new_empty(q.shape if keep else (0,))
    k_prepared = q.new_empty(k.shape if keep else (0,))
    for rows, keys, segment in segments(inputs):
        part = forward(segment, save_prepared=save_prepared)
        out[:, :, rows] = part[0]
        lse[:, :, rows] = part[1]
        if save_prepared:
            softmax_state[..., rows] = part[2]
        if keep:
            q_prepared[:, :, rows] = part[3]
            k_prepared[:, :, keys] = part[4]
    return out, lse, softmax_state, q_prepared, k_prepared


def join_backward(
    inputs: AttentionInputs,
    out: Tensor,
    softmax_state: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    backward: Backward,
    *,
    need_grad_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` of each sequence, written into the packed gradients."""
    grads = empty_gradients(inputs, out)
    grad_scale = empty_grad_scale(inputs, needed=need_grad_scale)
    for rows, keys, segment in segments(inputs):
        part = backward(
            segment,
            out[:, :, rows],
            softmax_state[..., rows],
            grad_out[:, :, rows],
            None if grad_lse is None else grad_lse[:, :, rows],
            need_grad_scale=need_grad_scale,
        )
        grads[0][:, :, rows] = part[0]
        grads[1][:, :, keys] = part[1]
        grads[2][:, :, keys] = part[2]
        if grad_scale.ndim == 3:
            grad_scale[:, :, rows] = part[3]
    return *grads, grad_scale
