"""Attention in float64, written from the formulas and sharing no code with drope_kernels.

It defines what the reference backend has to return. Materialises the scores; small inputs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from calls import TABLES, Call, inv_freq_table
from cases import Case, RopeCase
from torch import Tensor

Attend = Callable[[Call, dict[str, Tensor]], tuple[Tensor, Tensor]]
TAU = 2 * math.pi


# --- rotation ------------------------------------------------------------------------------------


def frequencies(case: Case) -> tuple[Tensor, float]:
    """Radians per position (1 or Hkv, dim / 2) in float64, and the factor on rotated channels."""
    rope = case.rope
    assert rope is not None
    if rope.kind in TABLES:
        return torch.atleast_2d(inv_freq_table(rope, case)), rope.attention_factor
    dim = rope.dim or case.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    base = rope.theta**-exponents
    if rope.kind == "yarn":
        return yarn(base, rope, dim)[None], 0.1 * math.log(rope.factor) + 1.0
    if rope.kind == "llama3":
        base = llama3(base, rope)
    elif rope.kind == "pi":
        base = base / rope.factor
    elif rope.kind in ("ntk", "dynamic_ntk"):
        stretch = rope.factor
        if rope.kind == "dynamic_ntk":
            stretch = rope.factor * rope.length / rope.original_length - (rope.factor - 1)
        base = (rope.theta * stretch ** (dim / (dim - 2))) ** -exponents
    else:
        assert rope.kind == "plain", rope.kind
    return base[None], rope.attention_factor


def yarn(base: Tensor, rope: RopeCase, dim: int) -> Tensor:
    """Peng et al. 2023, section 3.2, with beta_fast 32 and beta_slow 1."""

    def pair_with(rotations: float) -> float:
        ratio = rope.original_length / (rotations * TAU)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(32)), 0)
    high = min(math.ceil(pair_with(1)), dim - 1)
    ramp = ((torch.arange(dim // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)


def llama3(base: Tensor, rope: RopeCase) -> Tensor:
    """Meta's Llama 3.1 rule with low_freq_factor 1 and high_freq_factor 4."""
    turns_in_context = rope.original_length * base / TAU
    smooth = ((turns_in_context - 1) / (4 - 1)).clamp(0, 1)
    return (1 - smooth) * base / rope.factor + smooth * base


def cos_sin(case: Case, positions: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, num_heads, S, dim / 2) at `positions` (B, S), attention factor included."""
    table, factor = frequencies(case)
    table = table.expand(case.num_heads_kv, -1).repeat_interleave(
        num_heads // case.num_heads_kv, dim=0
    )
    angles = positions[:, None, :, None].double() * table[None, :, None, :]
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns each pair of the leading channels of x (B, H, S, D); the rest passes through."""
    dim = 2 * cos.shape[-1]
    turning, passing = x[..., :dim], x[..., dim:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([turned, passing], dim=-1)


# --- visibility ----------------------------------------------------------------------------------


def visible(case: Case) -> Tensor:
    """Which key each query sees: (B, 1, Sq, Skv) bool."""
    start = torch.tensor(case.query_starts(), dtype=torch.long).reshape(-1, 1, 1, 1)
    query = start + torch.arange(case.seqlen_q)[:, None]
    key = torch.arange(case.seqlen_kv)
    seen = torch.ones(case.batch, 1, case.seqlen_q, case.seqlen_kv, dtype=torch.bool)
    if case.kv_start is not None:
        seen = seen & (key >= torch.tensor(case.kv_start).reshape(-1, 1, 1, 1))
    if case.kv_end is not None:
        seen = seen & (key < torch.tensor(case.kv_end).reshape(-1, 1, 1, 1))
    if case.causal:
        seen = seen & (key <= query)
    if case.window is not None:
        seen = seen & (key > query - case.window)
        if not case.causal:
            seen = seen & (key < query + case.window)
    return seen


def rotation_positions(call: Call) -> tuple[Tensor, Tensor]:
    """Where queries and keys stand when they rotate: (B, Sq), (B, Skv)."""
    case = call.case
    if call.positions is not None:
        return call.positions
    starts = torch.tensor(case.query_starts(), dtype=torch.long)[:, None]
    return starts + torch.arange(case.seqlen_q), torch.arange(case.seqlen_kv).expand(case.batch, -1)


# --- attention -----------------------------------------------------------------------------------


def scale_rows(call: Call, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The multiplier of q.k for each query row, broadcastable to (B, Hq, Sq, 1)."""
    if scale is not None:
        return scale.to(dtype).expand(call.q.shape[:-1])[..., None]
    value = call.case.head_dim**-0.5 if call.scale is None else call.scale
    return torch.tensor(value, dtype=dtype)


def attend(call: Call, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a dense call, differentiable by autograd."""
    case = call.case
    q, k, v = (leaves[name].double() for name in ("q", "k", "v"))
    if case.rope is not None:
        where_q, where_kv = rotation_positions(call)
        q = rotate(q, *cos_sin(case, where_q, case.num_heads_q), case.rope.interleaved)
        k = rotate(k, *cos_sin(case, where_kv, case.num_heads_kv), case.rope.interleaved)
    group = case.num_heads_q // case.num_heads_kv
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    s = scale_rows(call, leaves.get("scale"), torch.float64) * (q @ k.transpose(-1, -2))
    if case.softcap is not None:
        s = case.softcap * torch.tanh(s / case.softcap)
    seen = visible(case)
    row_max, empty = largest(s.detach(), seen)
    e = (s.masked_fill(~seen, -math.inf) - row_max).exp()
    row_sum = e.sum(-1, keepdim=True) + empty
    lse = (row_max + row_sum.log())[..., 0]
    return e / row_sum @ v, lse.masked_fill(empty[..., 0], -math.inf)


def largest(s: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score (..., Sq, 1) that each row sees, 0 where it sees none, and which do not.

    exp(s - lse) would round lse, and at scores of 1e6 that is a tenth of every probability.
    """
    empty = ~seen.any(dim=-1, keepdim=True).expand(*s.shape[:-1], 1)
    nothing = s.new_full(empty.shape, -math.inf)  # calls without keys have a maximum, too
    scores = torch.cat([s.masked_fill(~seen, -math.inf), nothing], dim=-1)
    return scores.amax(-1, keepdim=True).masked_fill(empty, 0.0), empty


def attend_packed(attend: Attend, call: Call, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a packed call: one dense call for each sequence."""
    case = call.case
    outs, lses, first_q, first_kv = [], [], 0, 0
    for len_q, len_kv in zip(case.seqlens_q, case.seqlens_kv, strict=True):
        rows, keys = slice(first_q, first_q + len_q), slice(first_kv, first_kv + len_kv)
        first_q, first_kv = rows.stop, keys.stop
        part = {"q": leaves["q"][rows], "k": leaves["k"][keys], "v": leaves["v"][keys]}
        part = {name: tensor.transpose(0, 1)[None] for name, tensor in part.items()}
        if "scale" in leaves:
            part["scale"] = leaves["scale"].expand(case.num_heads_q, case.seqlen_q)[None, :, rows]
        one = replace(case, seqlen_q=len_q, seqlen_kv=len_kv, seqlens_q=None, seqlens_kv=None)
        sub = replace(call, case=one, q=part["q"], k=part["k"], v=part["v"])
        out, lse = attend(sub, part)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=-1)


def run(call: Call, attend: Attend = attend) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv and dscale of a call; in the precision of its tensors and `attend`."""
    leaves = call.leaves()
    if call.case.packed:
        out, lse = attend_packed(attend, call, leaves)
    else:
        out, lse = attend(call, leaves)
    return {"out": out, "lse": lse} | call.gradients(leaves, out, lse)
