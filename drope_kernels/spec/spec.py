"""What one call is: `AttentionInputs` or `DecodeInputs`, the data, and `AttentionSpec`."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def with_operands(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionInputs:
        """The same call of other tensors."""
        return replace(self, q=q, k=k, v=v)


@dataclass(frozen=True)
class DecodeInputs:
    """One validated `attention_decode`: append k, v to the caches, attend causally to all of it."""

    q: Tensor  # (B, Hq, Sq, D): the last Sq tokens of each row
    k_cache: Tensor  # (B, Hkv, Smax, D) or (num_pages, Hkv, page_size, D), written
    v_cache: Tensor  # the same with Dv
    k: Tensor | None  # (B, Hkv, Snew, D), not rotated
    v: Tensor | None  # (B, Hkv, Snew, Dv)
    cache_seqlens: Tensor  # (B,) int32, before the append
    page_table: Tensor | None  # (B, pages_per_row) int32
    scale: float | Tensor  # Tensor: (B, Hq, Sq) float32, any strides
    window: int | None
    softcap: float | None
    kv_start: Tensor | None  # (B,) int32
    rotation: Rotation | None  # positions are None: token j of a row is at j
    rotated_cache: bool  # keys were rotated when appended; else they rotate when read

    @property
    def num_new(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Keys that a row of the caches can hold."""
        rows = self.k_cache.shape[2]
        return rows if self.page_table is None else rows * self.page_table.shape[1]


@dataclass(frozen=True)
class AttentionSpec:
    """Everything that backend selection may look at: no tensor values, no pointers."""

    device: str  # "cpu", "cuda"
    device_index: int
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
    # q, k and v, or in decode the caches, start at and step by multiples of 16 bytes.
    aligned: bool
