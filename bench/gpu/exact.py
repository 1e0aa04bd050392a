"""float32 attention on samples: what a peer's result must equal before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_SCORES = 1 << 28  # float32 scores held at once: 1 GiB
NUM_ROWS = 32  # query rows compared per head
RELATIVE_LIMIT = 2e-2  # bfloat16 inputs and outputs, root mean square
MAX_GRADIENT_SCORES = 1 << 33  # above: gradients are compared with nobody


@dataclass(frozen=True)
class Inputs:
    """q (B, Hq, Sq, D), k and v (B, Hkv, Skv, D), grad_out as q; scale D^-0.5."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    causal: bool

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """NaN stays NaN, which no limit admits."""
    difference = (value.float() - reference.float()).norm()
    return float(difference / reference.float().norm())


def sample_rows(seqlen: int) -> Tensor:
    """First, last and evenly spaced rows."""
    return torch.linspace(0, seqlen - 1, min(NUM_ROWS, seqlen)).round().long().unique()


def probabilities(q_rows: Tensor, k: Tensor, rows: Tensor, shift: int, causal: bool) -> Tensor:
    """(R, Skv) softmax of rows at key index rows + shift. q_rows (R, D), k (Skv, D), float32."""
    scores = q_rows @ k.T / math.sqrt(k.shape[1])
    if causal:
        columns = torch.arange(k.shape[0], device=k.device)
        scores.masked_fill_(columns > (rows + shift)[:, None], -math.inf)
    return scores.softmax(dim=1)


def forward_rows(inputs: Inputs, batch: int, head: int, rows: Tensor) -> Tensor:
    """(R, D) output rows of one query head."""
    k, v = (x[batch, head // inputs.group].float() for x in (inputs.k, inputs.v))
    shift = inputs.k.shape[2] - inputs.q.shape[2]
    rows = rows.to(k.device)
    return probabilities(inputs.q[batch, head, rows].float(), k, rows, shift, inputs.causal) @ v


def gradients(inputs: Inputs, batch: int, kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """dq (group, Sq, D), dk, dv (Skv, D) of one kv head and its query heads, chunk by chunk."""
    k, v = (x[batch, kv_head].float() for x in (inputs.k, inputs.v))
    seqlen_q, seqlen_kv = inputs.q.shape[2], k.shape[0]
    scale, shift = k.shape[1] ** -0.5, seqlen_kv - seqlen_q
    dk, dv, dq = torch.zeros_like(k), torch.zeros_like(v), []
    chunk = max(1, CHUNK_SCORES // seqlen_kv)
    for head in range(kv_head * inputs.group, (kv_head + 1) * inputs.group):
        parts = []
        for start in range(0, seqlen_q, chunk):
            rows = torch.arange(start, min(start + chunk, seqlen_q), device=k.device)
            q = inputs.q[batch, head, rows].float()
            grad = inputs.grad_out[batch, head, rows].float()
            p = probabilities(q, k, rows, shift, inputs.causal)
            dv += p.T @ grad
            dp = grad @ v.T
            delta = (p * dp).sum(dim=1, keepdim=True)
            ds = p * (dp - delta) * scale
            dk += ds.T @ q
            parts.append(ds @ k)
        dq.append(torch.cat(parts))
    return torch.stack(dq), dk, dv


def forward_error(inputs: Inputs, out: Tensor) -> float:
    """Largest relative error over the first and the last head, sampled rows."""
    rows = sample_rows(inputs.q.shape[2])
    corners = {(0, 0), (inputs.q.shape[0] - 1, inputs.q.shape[1] - 1)}
    errors = [
        relative_error(
            out[batch, head, rows.to(out.device)], forward_rows(inputs, batch, head, rows)
        )
        for batch, head in corners
    ]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def unchanged(gradient: Tensor) -> Tensor:
    return gradient


def gradient_errors(
    inputs: Inputs,
    grads: Sequence[Tensor],
    restore: Callable[[Tensor], Tensor] = unchanged,
) -> list[float]:
    """Relative errors of dq, dk, dv of the last kv head; grads as q, k, v.

    restore: what undoes, in the reference's dq and dk, how q and k of `inputs` were prepared.
    """
    batch, kv_head = inputs.k.shape[0] - 1, inputs.k.shape[1] - 1
    heads = slice(kv_head * inputs.group, (kv_head + 1) * inputs.group)
    dq, dk, dv = gradients(inputs, batch, kv_head)
    reference = (restore(dq), restore(dk), dv)
    ours = (grads[0][batch, heads], grads[1][batch, kv_head], grads[2][batch, kv_head])
    return [relative_error(x, y) for x, y in zip(ours, reference, strict=True)]


def within_limit(errors: Sequence[float]) -> bool:
    return all(error <= RELATIVE_LIMIT for error in errors)
