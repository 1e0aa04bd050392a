"""The same-precision peer: eager torch, rounding where a fused kernel has to round.

q and k rotate in float32 and round once; P, dS and out are rounded before they enter a product;
delta is rowsum(dO * out) with the rounded out; everything else is float32. Its distance from the
yardstick is the error the precision itself costs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from calls import Call
from oracle import cos_sin, log_sum_exp, rotate, rotation_positions, scale_rows, visible
from torch import Tensor


def attend(call: Call, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a dense call, differentiable, out in the dtype of q."""
    case, dtype = call.case, call.q.dtype
    q, k, v = (leaves[name].float() for name in ("q", "k", "v"))
    if case.rope is not None:
        where_q, where_kv = rotation_positions(call)
        pairing = case.rope.interleaved
        cos_sin_q = (table.float() for table in cos_sin(case, where_q, case.num_heads_q))
        cos_sin_k = (table.float() for table in cos_sin(case, where_kv, case.num_heads_kv))
        q = RoundForward.apply(rotate(q, *cos_sin_q, pairing), dtype)
        k = RoundForward.apply(rotate(k, *cos_sin_k, pairing), dtype)
    group = case.num_heads_q // case.num_heads_kv
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    dot = RoundBackward.apply(q @ k.transpose(-1, -2), dtype)
    s = scale_rows(call, leaves.get("scale"), torch.float32) * dot
    if case.softcap is not None:
        s = case.softcap * torch.tanh(s / case.softcap)
    return Softmax.apply(s, v, visible(case), dtype)


class RoundForward(torch.autograd.Function):
    """x rounded to a dtype; its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class RoundBackward(torch.autograd.Function):
    """x as it is; its gradient rounded to a dtype, as dS is before dq and dk."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).float(), None


class Softmax(torch.autograd.Function):
    """out and lse from scores and values, with the backward that fused kernels compute."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, v: Tensor, seen: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        lse, empty = log_sum_exp(s, seen)
        p = (s.masked_fill(~seen, -math.inf) - lse[..., None]).exp()
        out = (p.to(dtype).float() @ v).to(dtype)
        ctx.save_for_backward(p, v, out, empty)
        return out, lse.masked_fill(empty, -math.inf)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        p, v, out, empty = ctx.saved_tensors
        grad_out = grad_out.float()
        delta = (grad_out * out.float()).sum(-1) - grad_lse.masked_fill(empty, 0.0)
        grad_s = p * (grad_out @ v.transpose(-1, -2) - delta[..., None])
        grad_v = p.to(out.dtype).float().transpose(-1, -2) @ grad_out
        return grad_s, grad_v, None, None
