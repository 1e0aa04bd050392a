"""What the Triton kernels are given: the structs of csrc/attention_params.h, shapes in the margin.

Strides count elements; every tensor has unit stride in its last dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drope_kernels.spec import AttentionInputs, Rotation

MAX_SEQLEN = 2**29
# No index of a key is as large, and sums of two such numbers and a row fit an int32.
_FARTHEST_START = 2**29
_UNLIMITED = 2**30


class Rows(NamedTuple):
    """A (batch, heads, rows, channels) tensor."""

    ptr: Tensor
    stride_batch: int
    stride_head: int
    stride_row: int


class ShapeParams(NamedTuple):
    """Sizes, and in packed calls whose rows are whose."""

    batch: int  # 1 in packed calls
    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int  # of all sequences together in packed calls
    seqlen_kv: int
    cu_seqlens_q: Tensor | None  # (num_seqs + 1,) int32; None: not packed
    cu_seqlens_k: Tensor | None
    num_seqs: int


class MaskParams(NamedTuple):
    """Query i at key index x = q_start + i sees keys x - behind up to x + ahead, the end excluded.

    Not used of packed calls: q_start, q_offset, kv_start, kv_end.
    """

    behind: int
    ahead: int
    q_offset: int
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
    softcap: float  # 0: none


class RotaryParams(NamedTuple):
    """How q and k rotate; its other half are the constants ROTARY_DIM and INTERLEAVED."""

    turns_hi: Tensor | None  # (num_tables, rotary_dim / 2) float32; None: position-free
    turns_lo: Tensor | None
    num_tables: int  # 1 or num_heads_kv
    attention_factor: float
    positions: Tensor | None  # (batch, seqlen_q) float32; None: q_start + i
    kv_positions: Tensor | None  # (batch, seqlen_kv) float32; None: j
    stride_positions_batch: int
    stride_kv_positions_batch: int


def rows_of(x: Tensor) -> Rows:
    """`x` (batch, heads, rows, channels) as an argument of a kernel."""
    batch, head, row, channel = x.stride()
    assert channel == 1 or x.shape[3] <= 1
    return Rows(x, batch, head, row)


def shape_params(inputs: AttentionInputs) -> ShapeParams:
    batch, num_heads_q, seqlen_q, _ = inputs.q.shape
    _, num_heads_kv, seqlen_kv, _ = inputs.k.shape
    ends_q, ends_k = _contiguous(inputs.cu_seqlens_q), _contiguous(inputs.cu_seqlens_k)
    num_seqs = 0 if ends_q is None else ends_q.shape[0] - 1
    return ShapeParams(
        batch, num_heads_q, num_heads_kv, seqlen_q, seqlen_kv, ends_q, ends_k, num_seqs
    )


def mask_params(inputs: AttentionInputs) -> MaskParams:
    behind = _UNLIMITED if inputs.window is None else min(inputs.window - 1, _UNLIMITED)
    ahead = _UNLIMITED if inputs.window is None else min(inputs.window, _UNLIMITED)
    if inputs.causal:
        ahead = 1
    starts, ends = _contiguous(inputs.kv_start), _contiguous(inputs.kv_end)
    q_start = inputs.q_start
    if isinstance(q_start, Tensor):
        return MaskParams(behind, ahead, 0, q_start.contiguous(), starts, ends)
    # An index beyond every key, of a window wider than every key, still has its exact ends.
    q_offset = min(max(q_start, -_FARTHEST_START), _FARTHEST_START)
    behind = min(max(q_offset - (q_start - behind), -_UNLIMITED), _UNLIMITED)
    ahead = min(max(q_start + ahead - q_offset, -_UNLIMITED), _UNLIMITED)
    return MaskParams(behind, ahead, q_offset, None, starts, ends)


def scale_params(inputs: AttentionInputs) -> ScaleParams:
    softcap = inputs.softcap or 0.0
    scale = inputs.scale
    if isinstance(scale, Tensor):
        batch, head, row = scale.stride()
        return ScaleParams(0.0, scale, batch, head, row, softcap)
    return ScaleParams(scale, None, 0, 0, 0, softcap)


def rotary_params(rotation: Rotation | None) -> RotaryParams:
    if rotation is None:
        return RotaryParams(None, None, 1, 1.0, None, None, 0, 0)
    turns = rotation.turns.to(torch.float32)
    positions, kv_positions = _contiguous(rotation.positions), _contiguous(rotation.kv_positions)
    return RotaryParams(
        turns[0].contiguous(),
        turns[1].contiguous(),
        turns.shape[1],
        rotation.attention_factor,
        positions,
        kv_positions,
        0 if positions is None else positions.shape[1],
        0 if kv_positions is None else kv_positions.shape[1],
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
