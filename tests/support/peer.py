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
from oracle import cos_sin, largest, rotate, rotation_positions, scale_rows, visible
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
    t = RoundBackward.apply(q @ k.transpose(-1, -2), dtype)
    factor = scale_rows(call, leaves.get("scale"), torch.float32)
    if case.softcap is not None:
        t, factor = torch.tanh(factor * t / case.softcap), torch.tensor(case.softcap)
    return Softmax.apply(t, factor, v, visible(case), dtype)


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
    """out and lse from scores t and values, with the backward that fused kernels compute.

    The factor comes after the difference to the row's largest, as in design: it rounds no ratio.
    """

    @staticmethod
    def forward(
        ctx: Any, t: Tensor, factor: Tensor, v: Tensor, seen: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        row_max, empty = largest(t, seen)
        e = ((t.masked_fill(~seen, -math.inf) - row_max) * factor).exp()
        row_sum = e.sum(-1, keepdim=True) + empty
        p = e / row_sum
        out = (p.to(dtype).float() @ v).to(dtype)
        ctx.save_for_backward(p, t, factor, v, out, empty[..., 0])
        lse = (factor * row_max + row_sum.log())[..., 0]
        return out, lse.masked_fill(empty[..., 0], -math.inf)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        p, t, factor, v, out, empty = ctx.saved_tensors
        grad_out = grad_out.float()
        delta = (grad_out * out.float()).sum(-1) - grad_lse.masked_fill(empty, 0.0)
        grad_s = p * (grad_out @ v.transpose(-1, -2) - delta[..., None])
        grad_v = p.to(out.dtype).float().transpose(-1, -2) @ grad_out
        grad_factor = (grad_s * t).sum_to_size(factor.shape) if ctx.needs_input_grad[1] else None
        return grad_s * factor, grad_factor, grad_v, None, None
