"""What one attention call is: `AttentionInputs`, the data, and `AttentionSpec`, for selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How q and k rotate; absent (None) in position-free calls.

    Angles are turns: the rotation of pair p at position t is frac(t * turns[p]) of a full circle.
    """

    turns: Tensor  # (2, 1 or Hkv, rotary_dim / 2) float32: inv_freq / 2 pi as high + low part
    interleaved: bool
    attention_factor: float
    positions: Tensor | None  # (B, Sq) float32; None: q_start + i
    kv_positions: Tensor | None  # (B, Skv) float32; None: j

    @property
    def dim(self) -> int:
        return 2 * self.turns.shape[-1]


@dataclass(frozen=True)
class AttentionInputs:
    """One validated call. q and k are the prepared (rotated) ones in a backward call."""

    q: Tensor  # (B, Hq, Sq, D); packed calls: (1, Hq, total_q, D)
    k: Tensor  # (B, Hkv, Skv, D)
    v: Tensor  # (B, Hkv, Skv, Dv)
    scale: float | Tensor  # Tensor: (B, Hq, Sq) float32, any strides
    causal: bool
    window: int | None
    softcap: float | None
    q_start: int | Tensor  # Tensor: (B,) int32; packed calls: 0, each sequence is end-aligned
    kv_start: Tensor | None  # (B,) int32
    kv_end: Tensor | None  # (B,) int32
    rotation: Rotation | None
    cu_seqlens_q: Tensor | None = None  # (num_seqs + 1,) int32; packed calls only
    cu_seqlens_k: Tensor | None = None  # (num_seqs + 1,) int32


@dataclass(frozen=True)
class AttentionSpec:
    """Everything that backend selection may look at: no tensor values, no pointers."""

    device: str  # "cpu", "cuda"
    dtype: torch.dtype
    batch: int
    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool
    window: bool
    softcap: bool
    kv_range: bool
    row_scale: bool
    rotary_dim: int  # 0: position-free
    interleaved: bool
    varlen: bool
    decode: bool
    needs_grad: bool
    deterministic: bool
