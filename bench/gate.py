"""The correctness gate: no case is timed before sampled rows and keys of it agree with float64.

Sampling keeps the gate O(S D) at any length. The limit comes from a peer: the same samples
computed by plain torch in the case's own precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import drope_kernels

from .cases import BenchCase, tensors

NUM_SAMPLES = 24


@dataclass(frozen=True)
class Gate:
    """Relative rms errors against float64, ours and the peer's, per tensor."""

    errors: dict[str, float]
    limits: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    def check(self, case: BenchCase) -> None:
        wrong = {k: v for k, v in self.errors.items() if not v <= self.limits[k]}
        if wrong:
            raise AssertionError(f"{case.name} is not timed: errors {wrong}, limits {self.limits}")


def _rotate(x: Tensor, precision: torch.dtype) -> Tensor:
    """Half-split RoPE in float64 for the truth; else rotated in float32 and rounded once."""
    work = torch.float64 if precision == torch.float64 else torch.float32
    seqlen, dim = x.shape[-2:]
    inv_freq = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(seqlen, dtype=torch.float64)[:, None] * inv_freq
    cos, sin = angles.cos().to(work), angles.sin().to(work)
    left, right = x.to(work).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(precision)


@dataclass(frozen=True)
class _Head:
    """One query head with its keys and values, and what the kernel returned for it."""

    q: Tensor  # (S, D), rotated where the case rotates
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor  # (S,)
    grad_out: Tensor

    def to(self, dtype: torch.dtype) -> _Head:
        narrow = (t.to(dtype) for t in (self.q, self.k, self.v, self.out))
        return _Head(*narrow, lse=self.lse.double(), grad_out=self.grad_out.to(dtype))


def _scores(head: _Head, rows: Tensor, keys: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    scores = (head.q[rows] @ head.k[keys].T).to(dtype) * head.q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(keys[None, :] > rows[:, None], float("-inf"))
    return scores


def _sampled(head: _Head, rows: Tensor, keys: Tensor, causal: bool) -> dict[str, Tensor]:
    """out, lse and un-restored gradients at the sampled rows (out, lse, dq) and keys (dk, dv)."""
    dtype = head.q.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    everything = torch.arange(head.q.shape[0])
    scale = head.q.shape[-1] ** -0.5

    scores = _scores(head, rows, everything, causal, work)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.exp(scores - lse[:, None])
    delta = (head.grad_out.to(work) * head.out.to(work)).sum(-1)
    ds = p * ((head.grad_out[rows] @ head.v.T).to(work) - delta[rows, None])
    found = {"out": p.to(dtype) @ head.v, "lse": lse, "dq": (ds.to(dtype) @ head.k) * scale}

    scores = _scores(head, everything, keys, causal, work)
    p = torch.exp(scores - head.lse.to(work)[:, None])
    ds = p * ((head.grad_out @ head.v[keys].T).to(work) - delta[:, None])
    found["dv"] = p.to(dtype).T @ head.grad_out
    found["dk"] = (ds.to(dtype).T @ head.q) * scale
    return found


def run_gate(case: BenchCase) -> Gate:
    """Compare one head of `drope_kernels.attention` with float64 at sampled rows and keys."""
    q, k, v = (t.requires_grad_(case.backward) for t in tensors(case))
    out, lse = drope_kernels.attention(q, k, v, rope=case.rope, causal=case.causal, return_lse=True)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    last = case.num_heads_q - 1
    ours = {"out": out[0, last].detach(), "lse": lse[0, last].detach()}
    # Gradients are compared where a key head has one query head and nothing was rotated: the
    # sample of a key's gradient would otherwise need the whole group, or the restored rotation.
    gradients = case.backward and not case.grouped and not case.rope
    if case.backward:
        out.backward(grad_out)
    if gradients:
        ours |= {n: t.grad[0, last] for n, t in (("dq", q), ("dk", k), ("dv", v))}
    del out, lse

    rows = torch.randperm(case.seqlen, generator=generator)[:NUM_SAMPLES]
    keys = torch.randperm(case.seqlen, generator=generator)[:NUM_SAMPLES]

    def head(precision: torch.dtype) -> _Head:
        raw_q, raw_k = q[0, last].detach(), k[0, -1].detach()
        if case.rope:
            raw_q, raw_k = _rotate(raw_q, precision), _rotate(raw_k, precision)
        parts = (raw_q, raw_k, v[0, -1].detach(), ours["out"], ours["lse"], grad_out[0, last])
        return _Head(*parts).to(precision)

    truth = _sampled(head(torch.float64), rows, keys, case.causal)
    peer = _sampled(head(case.torch_dtype), rows, keys, case.causal)
    at = {"out": rows, "lse": rows, "dq": rows, "dk": keys, "dv": keys}

    def error(value: Tensor, name: str) -> float:
        return float((value.double() - truth[name]).norm() / truth[name].norm())

    errors = {n: error(t[at[n]], n) for n, t in ours.items()}
    limits = {n: 2 * error(peer[n], n) + 2e-6 for n in errors}
    return Gate(errors, limits)
