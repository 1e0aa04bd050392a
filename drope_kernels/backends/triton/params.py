"""What the Triton kernels are given: the structs of csrc/attention_params.h, shapes in the margin.

Strides count elements; every tensor has unit stride in its last dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drope_kernels.spec.spec import AttentionInputs, Rotation

MAX_SEQLEN = 2**28 - 1
# Limits of calls without a window whose q_start is an int32 on the device: from wherever that is,
# so many keys reach past both ends of every tensor.
_UNLIMITED = 2**33
# No index of a key is larger, and four times the distance of two such indices fits an int32.
_FARTHEST_START = MAX_SEQLEN


class Rows(NamedTuple):
    """A (batch, heads, rows, channels) tensor."""

    ptr: Tensor
    stride_batch: int
    stride_head: int
    stride_row: int


class ShapeParams(NamedTuple):
    """Sizes."""

    batch: int  # 1 in packed calls
    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int  # of all sequences together in packed calls
    seqlen_kv: int
    num_seqs: int  # 0: not packed


class MaskParams(NamedTuple):
    """Query i at key index x = q_start + i sees keys x - behind up to x + ahead, the end excluded.

    q_start is that of RangeParams, q_offset, or of packed calls seqlen_kv - seqlen_q.
    """

    behind: int
    ahead: int
    q_offset: int


class RangeParams(NamedTuple):
    """Where sequences and their valid keys are: values that the caller keeps on the device."""

    cu_seqlens_q: Tensor | None  # (num_seqs + 1,) int32; None: not packed
    cu_seqlens_k: Tensor | None
    q_start: Tensor | None  # (batch,) int32; None: q_offset
    kv_start: Tensor | None  # (batch,) int32; None: 0
    kv_end: Tensor | None  # (batch,) int32; None: seqlen_kv


class ScaleParams(NamedTuple):
    """The multiplier of q.k."""

    value: float  # where rows is None
    rows: Tensor | None  # (batch, num_heads_q, seqlen_q) float32
    stride_batch: int
    stride_head: int
    stride_row: int
    softcap: float  # 0: none; at most 2^127


class RotaryParams(NamedTuple):
    """How q and k rotate; its other half are the constants ROTARY_DIM and INTERLEAVED."""

    turns_hi: Tensor | None  # (num_tables, rotary_dim / 2) float32; None: position-free
    turns_lo: Tensor | None
    num_tables: int  # 1 or num_heads_kv
    attention_factor: float
    positions: Tensor | None  # (batch, seqlen_q) contiguous float32; None: q_start + i
    kv_positions: Tensor | None  # (batch, seqlen_kv) contiguous float32; None: j


def rows_of(x: Tensor) -> Rows:
    """`x` (batch, heads, rows, channels) as an argument of a kernel."""
    batch, head, row, channel = x.stride()
    assert channel == 1 or x.shape[3] <= 1 or x.numel() == 0  # which no kernel steps through
    return Rows(x, batch, head, row)


def shape_params(inputs: AttentionInputs) -> ShapeParams:
    batch, num_heads_q, seqlen_q, _ = inputs.q.shape
    _, num_heads_kv, seqlen_kv, _ = inputs.k.shape
    num_seqs = 0 if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.shape[0] - 1
    return ShapeParams(batch, num_heads_q, num_heads_kv, seqlen_q, seqlen_kv, num_seqs)


def mask_params(inputs: AttentionInputs) -> MaskParams:
    """Exact for any window and any q_start."""
    window, q_start = inputs.window, inputs.q_start
    if isinstance(q_start, Tensor):
        limit = _UNLIMITED if window is None else min(window, _UNLIMITED)
        return MaskParams(limit - 1, 1 if inputs.causal else limit, 0)
    # The keys of query 0, were there keys everywhere.
    begin, end = -MAX_SEQLEN, q_start + 1 if inputs.causal else MAX_SEQLEN
    if window is not None:
        begin = _bounded(q_start - window + 1, MAX_SEQLEN)
        end = end if inputs.causal else q_start + window
    q_offset = _bounded(q_start, _FARTHEST_START)
    return MaskParams(q_offset - begin, _bounded(end, MAX_SEQLEN) - q_offset, q_offset)


def range_params(inputs: AttentionInputs) -> RangeParams:
    q_start = inputs.q_start if isinstance(inputs.q_start, Tensor) else None
    tensors = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, q_start, inputs.kv_start, inputs.kv_end)
    return RangeParams(*map(_contiguous, tensors))


def every_key_is_seen(inputs: AttentionInputs) -> bool:
    """Whether each key is seen by a query, whatever the tensors of the call say.

    Then a key that a tile of queries does not see is a number all the same: 0 p of it is 0.
    """
    values = (inputs.cu_seqlens_q, inputs.kv_start, inputs.kv_end)
    if isinstance(inputs.q_start, Tensor) or any(x is not None for x in values):
        return False
    first, last = inputs.q_start, inputs.q_start + inputs.q.shape[2] - 1
    begin = 0 if inputs.window is None else first - inputs.window + 1
    end = last + 1 if inputs.causal else inputs.k.shape[2]
    if inputs.window is not None and not inputs.causal:
        end = last + inputs.window
    return begin <= 0 and end >= inputs.k.shape[2]


def every_query_sees(inputs: AttentionInputs) -> bool:
    """Whether each query sees a key, whatever the tensors of the call say.

    Then a query that does not see a tile of keys is numbers all the same: 0 dS of it is 0.
    """
    values = (inputs.cu_seqlens_q, inputs.kv_start, inputs.kv_end)
    if isinstance(inputs.q_start, Tensor) or any(x is not None for x in values):
        return False
    first, last = inputs.q_start, inputs.q_start + inputs.q.shape[2] - 1
    begin = 0 if inputs.window is None else last - inputs.window + 1
    end = first + 1 if inputs.causal else inputs.k.shape[2]
    if inputs.window is not None and not inputs.causal:
        end = first + inputs.window
    return begin < inputs.k.shape[2] and end > 0


def scale_params(inputs: AttentionInputs) -> ScaleParams:
    # Times log2(e) it is a float32. Only scores beyond 2^114 tell larger ones from this one.
    softcap = min(inputs.softcap or 0.0, 2.0**127)
    scale = inputs.scale
    if isinstance(scale, Tensor):
        batch, head, row = scale.stride()
        return ScaleParams(0.0, scale, batch, head, row, softcap)
    return ScaleParams(scale, None, 0, 0, 0, softcap)


def rotary_params(rotation: Rotation | None) -> RotaryParams:
    if rotation is None:
        return RotaryParams(None, None, 1, 1.0, None, None)
    turns = rotation.turns.to(torch.float32)
    return RotaryParams(
        turns[0].contiguous(),
        turns[1].contiguous(),
        turns.shape[1],
        rotation.attention_factor,
        _contiguous(rotation.positions),
        _contiguous(rotation.kv_positions),
    )


def _bounded(index: int, farthest: int) -> int:
    return min(max(index, -farthest), farthest)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
