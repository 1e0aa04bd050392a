"""A named case made real: its tensors, its call, its gradients."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cases import Case, RopeCase
from magnitudes import MAGNITUDES
from torch import Tensor

import drope_kernels as dk


@dataclass
class Call:
    """A case made real. `options` are attention's keyword arguments but for scale and backend."""

    case: Case
    q: Tensor  # (B, Hq, Sq, D); packed: (total_q, Hq, D)
    k: Tensor  # (B, Hkv, Skv, D)
    v: Tensor  # (B, Hkv, Skv, Dv)
    scale: float | Tensor | None
    grad_out: Tensor  # like out
    grad_lse: Tensor | None  # (B, Hq, Sq) float32
    positions: tuple[Tensor, Tensor] | None  # (B, Sq), (B, Skv)
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Call:
        """The same values in another precision: what the yardstick and the peer compute from."""
        converted = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "grad_out")}
        if isinstance(self.scale, Tensor):
            converted["scale"] = self.scale.to(scale_dtype(dtype))
        return replace(self, **converted)

    def leaves(self) -> dict[str, Tensor]:
        """The tensors whose gradients are checked, as fresh leaves with the call's own strides."""
        leaves = {name: getattr(self, name).detach() for name in ("q", "k", "v")}
        if isinstance(self.scale, Tensor):
            leaves["scale"] = self.scale.detach()
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def outputs(self, leaves: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
        """(out, lse) of our public entry point."""
        operands = (leaves["q"], leaves["k"], leaves["v"])
        scale = leaves.get("scale", self.scale)
        if not self.case.packed:
            return dk.attention(
                *operands, scale=scale, return_lse=True, backend=backend, **self.options
            )
        lengths = self.case.seqlens_q, self.case.seqlens_kv
        offsets = (cumulative(one).to(self.q.device) for one in lengths)
        return dk.attention_varlen(
            *operands, *offsets, scale=scale, return_lse=True, backend=backend, **self.options
        )

    def run(self, backend: str) -> dict[str, Tensor]:
        """out, lse and every gradient under the names of design: dq, dk, dv, dscale."""
        leaves = self.leaves()
        out, lse = self.outputs(leaves, backend)
        return {"out": out, "lse": lse} | self.gradients(leaves, out, lse)

    def gradients(self, leaves: dict[str, Tensor], out: Tensor, lse: Tensor) -> dict[str, Tensor]:
        outputs, seeds = [out], [self.grad_out.to(out.dtype)]
        if self.grad_lse is not None:
            outputs, seeds = [out, lse], [*seeds, self.grad_lse.to(lse.dtype)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), seeds)
        return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def cumulative(lengths: tuple[int, ...] | None) -> Tensor:
    """Sequence lengths to (num_seqs + 1,) int32 offsets."""
    assert lengths is not None
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """A scale tensor is float32, and float64 only in float64 calls."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- tensors -------------------------------------------------------------------------------------


def make_call(case: Case, dtype: torch.dtype) -> Call:
    """The case's tensors: the same for every backend and, up to rounding, for every dtype."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = (case.batch, case.num_heads_q, case.seqlen_q)
    q = normal(*rows, case.head_dim)
    k = normal(case.batch, case.num_heads_kv, case.seqlen_kv, case.head_dim)
    v = normal(case.batch, case.num_heads_kv, case.seqlen_kv, case.value_dim)
    grad_out, grad_lse = normal(*rows, case.value_dim), normal(*rows)
    q, k = MAGNITUDES[case.magnitude](q, k)
    scale = make_scale(case, torch.rand(rows, generator=generator, dtype=torch.float64))
    if isinstance(scale, Tensor):
        scale = scale.to(scale_dtype(dtype))
    q, k, v, grad_out = (tensor.to(dtype) for tensor in (q, k, v, grad_out))
    if case.packed:
        q, k, v, grad_out = (tensor[0].transpose(0, 1) for tensor in (q, k, v, grad_out))
        grad_lse = grad_lse[0]
    q, k, v = lay_out(case.layout, q, k, v)
    positions = make_positions(case, generator)
    grad_lse = grad_lse.float() if case.lse_grad else None
    options = make_options(case, positions)
    return Call(case, q, k, v, scale, grad_out, grad_lse, positions, options)


def make_scale(case: Case, uniform: Tensor) -> float | Tensor | None:
    """The scale argument; tensor forms vary by a factor of 3 around head_dim ** -0.5."""
    if case.scale == "default":
        return None
    if case.scale == "float":
        return 0.3
    # Values that float32 holds, so that every precision computes with the same numbers.
    rows = ((0.5 + uniform) * case.head_dim**-0.5).float()  # (B, Hq, Sq)
    if case.packed:
        rows = rows[0]
    if case.scale == "call":
        return rows.flatten()[0].clone()
    if case.scale == "head":
        return rows[..., :1].clone() if case.packed else rows[0, :, :1].clone()
    if case.scale == "batch":
        return rows[:, :1, :1].clone()
    if case.scale == "query":
        return rows.flatten(0, -2)[0].clone()
    assert case.scale == "row", case.scale
    return rows


def lay_out(layout: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values under other strides."""
    if layout == "bhsd":
        return q, k, v
    if layout == "bshd":
        return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if layout == "fused":
        return split_fused(q, k, v)
    if layout == "expanded_heads":
        return q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    assert layout == "expanded_batch", layout
    return q, k[:1].expand_as(k), v[:1].expand_as(v)


def split_fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Column slices of one (B, S, channels) projection, with a gap, as a fused qkv layer gives."""
    flat = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    gap = q.new_full((*flat[0].shape[:2], 8), torch.nan)  # read by nobody, or the result is NaN
    buffer = torch.cat([gap, *flat, gap], dim=-1)
    parts = buffer[..., 8:-8].split([part.shape[-1] for part in flat], dim=-1)
    return tuple(
        part.unflatten(-1, (t.shape[1], t.shape[3])).transpose(1, 2)
        for part, t in zip(parts, (q, k, v), strict=True)
    )


def make_positions(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Explicit positions of queries and keys: (B, Sq) and (B, Skv)."""
    if case.positions is None:
        return None
    starts = torch.tensor(case.query_starts())[:, None]
    index_q = starts + torch.arange(case.seqlen_q)
    index_kv = torch.arange(case.seqlen_kv).expand(case.batch, -1)
    if case.positions == "from_kv_start":
        first = torch.tensor(case.kv_start)[:, None]
        return (index_q - first).clamp(min=0), (index_kv - first).clamp(min=0)
    if case.positions == "fractional":
        return index_q.float() / 4, index_kv.float() / 4
    shape = (case.batch, case.seqlen_kv)
    if case.positions == "plus_minus_one":
        signs = torch.randint(0, 2, (2, *shape), generator=generator) * 2 - 1
        return signs[0, :, : case.seqlen_q], signs[1]
    assert case.positions == "million", case.positions
    far = torch.randint(0, 1_000_000, shape, generator=generator).sort().values
    return 1_000_000 - case.seqlen_q + index_q - starts, far


def make_options(case: Case, positions: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": case.causal}
    for name in ("window", "softcap"):
        if getattr(case, name) is not None:
            options[name] = getattr(case, name)
    for name in ("q_start", "kv_start", "kv_end"):
        value = getattr(case, name)
        if value is not None:
            options[name] = (
                torch.tensor(value, dtype=torch.int32) if isinstance(value, tuple) else value
            )
    if case.rope is not None:
        options["rope"] = make_rope(case.rope, case)
    if positions is not None:
        options["positions"], options["kv_positions"] = positions
    return options


# --- rotation ------------------------------------------------------------------------------------

TABLES = ("table", "per_head", "pythagorean")


def make_rope(rope: RopeCase, case: Case) -> dk.Rope:
    """The `Rope` a user would build for these numbers."""
    plain: dict[str, Any] = {"theta": rope.theta, "dim": rope.dim, "interleaved": rope.interleaved}
    length = rope.original_length
    if rope.kind == "pi":
        return dk.Rope.pi(rope.factor, **plain)
    if rope.kind == "ntk":
        return dk.Rope.ntk(rope.factor, **plain)
    if rope.kind == "dynamic_ntk":
        return dk.Rope.dynamic_ntk(
            rope.factor, seq_len=rope.length, max_position_embeddings=length, **plain
        )
    if rope.kind == "yarn":
        return dk.Rope.yarn(rope.factor, original_max_position_embeddings=length, **plain)
    if rope.kind == "llama3":
        return dk.Rope.llama3(
            rope.factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=length,
            **plain,
        )
    if rope.kind in TABLES:
        plain["inv_freq"] = inv_freq_table(rope, case)
    return dk.Rope(attention_factor=rope.attention_factor, **plain)


def inv_freq_table(rope: RopeCase, case: Case) -> Tensor:
    """Tables only a caller can write: fading strengths, rows per head with zeros."""
    dim = rope.dim or case.head_dim
    if rope.kind == "pythagorean":
        angles = [math.atan2(7, 24), math.atan2(24, 7)]
        return torch.tensor(angles, dtype=torch.float64).repeat(dim // 4)
    base = rope.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if rope.kind == "table":
        return base * torch.linspace(1, 0, dim // 2, dtype=torch.float64)
    heads = case.num_heads_kv
    # Head 0 does not rotate at all, the last head keeps only its faster half.
    table = base * torch.linspace(0, 1, heads, dtype=torch.float64)[:, None]
    table[-1, dim // 4 :] = 0
    return table
