"""The definition of attention in this package: eager PyTorch, every argument, nothing fused.

Each other backend is a translation of this file. Half precision inputs are computed in float32,
float64 in float64; angles are always float64. A row that sees no key gives out 0, lse -inf and
gradients 0. Memory is O(Sq * Skv): this is a measure, not a kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from drope_kernels.spec.layout import empty_grad_scale, empty_gradients, empty_in_order_of
from drope_kernels.spec.packed import Forward, ForwardResults, join_backward, join_forward
from drope_kernels.spec.spec import AttentionInputs, AttentionSpec, DecodeInputs, Rotation
from drope_kernels.spec.values import readable

NAME = "reference"
LOG2E = 1 / math.log(2)
LN2 = math.log(2)


def unavailable() -> str | None:
    """Why this backend cannot run here at all: never."""
    return None


def supports(spec: AttentionSpec) -> str | None:
    """Why this backend cannot serve a call: never."""
    return None


def served_by(spec: AttentionSpec) -> str | None:
    """Which of its kernels serve a call: it has one kind."""
    return None


def repeated(inputs: AttentionInputs) -> None:
    """Nothing is gained by knowing a call before."""
    return


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of everything between reading the inputs and rounding the results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(x: Tensor, positions: Tensor, rotation: Rotation, *, inverse: bool = False) -> Tensor:
    """R(positions) x, or with `inverse` its transpose, attention_factor * R(-positions) x.

    x (B, H, S, D) in compute precision, positions (B or 1, S); q heads share the table of their
    kv head. A pair (x1, x2) at angle a goes to (x1 cos a - x2 sin a, x2 cos a + x1 sin a).
    """
    turns = rotation.turns.double().sum(0)  # (T, dim / 2), T = 1 or Hkv
    if turns.shape[0] > 1:
        turns = turns.repeat_interleave(x.shape[1] // turns.shape[0], dim=0)
    angle = positions.double()[:, None, :, None] * turns[:, None, :]  # (B, H or 1, S, dim / 2)
    angle = (angle - angle.round()) * (-2 * math.pi if inverse else 2 * math.pi)
    cos = (rotation.attention_factor * angle.cos()).to(x.dtype)
    sin = (rotation.attention_factor * angle.sin()).to(x.dtype)
    turned, still = x[..., : rotation.dim], x[..., rotation.dim :]
    if rotation.interleaved:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    else:
        x1, x2 = turned.chunk(2, dim=-1)
        turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((turned, still), dim=-1)


def query_index(inputs: AttentionInputs) -> Tensor:
    """(B or 1, Sq) int64: the key index at which each query sits, q_start + i."""
    rows = torch.arange(inputs.q.shape[2], device=inputs.q.device)
    start = inputs.q_start
    return (start[:, None] if isinstance(start, Tensor) else start) + rows.unsqueeze(0)


def valid_keys(inputs: AttentionInputs) -> Tensor:
    """(B or 1, Skv) bool: kv_start <= j < kv_end."""
    j = torch.arange(inputs.k.shape[2], device=inputs.k.device).unsqueeze(0)
    valid = torch.ones_like(j, dtype=torch.bool)
    if inputs.kv_start is not None:
        valid = valid & (j >= inputs.kv_start[:, None])
    if inputs.kv_end is not None:
        valid = valid & (j < inputs.kv_end[:, None])
    return valid


def visible(inputs: AttentionInputs) -> Tensor:
    """(B or 1, Sq, Skv) bool: which keys each query sees."""
    i = query_index(inputs).unsqueeze(-1)
    j = torch.arange(inputs.k.shape[2], device=inputs.k.device)
    mask = valid_keys(inputs).unsqueeze(1).expand(-1, i.shape[1], -1)
    if inputs.causal:
        mask = mask & (j <= i)
    if inputs.window is not None:
        mask = mask & (j > i - inputs.window)
        if not inputs.causal:
            mask = mask & (j < i + inputs.window)
    return mask


def positions_of(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Rotation positions of queries (B or 1, Sq) and keys (B or 1, Skv)."""
    rotation = inputs.rotation
    given_q = rotation.positions if rotation else None
    given_k = rotation.kv_positions if rotation else None
    keys = torch.arange(inputs.k.shape[2], device=inputs.k.device).unsqueeze(0)
    return (
        query_index(inputs) if given_q is None else given_q,
        keys if given_k is None else given_k,
    )


def prepare(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """q' and k': rotated in compute precision, rounded once to the input dtype."""
    if inputs.rotation is None:
        return inputs.q, inputs.k
    dtype, compute = inputs.q.dtype, compute_dtype(inputs.q.dtype)
    q_positions, k_positions = positions_of(inputs)
    q = rotate(inputs.q.to(compute), q_positions, inputs.rotation).to(dtype)
    k = rotate(inputs.k.to(compute), k_positions, inputs.rotation).to(dtype)
    return q.contiguous(), k.contiguous()


def exponent(t: Tensor, row_max: Tensor, factor: float | Tensor) -> Tensor:
    """To base 2, relative to the largest score of the row: at most 0, exactly 0 there.

    The difference comes first, so that no score is too large: what a factor times t is rounded by
    could be more than the difference of two scores.
    """
    return (t - row_max).mul_(factor).mul_(LOG2E)


class _Scores:
    """t_ij, the scores before the factor that makes them s_ij, in compute precision.

    s_ij = scale_i q'_i . k'_j: t is the product and the factor is the scale. With a softcap t is
    tanh(s_ij / softcap) and the factor is the softcap. Query heads that share a kv head lie one
    below the other: rows (B, Hkv, G * Sq, X), keys (B, Hkv, Skv, X), scores (B, Hkv, G * Sq, Skv).
    """

    def __init__(self, inputs: AttentionInputs, q: Tensor, k: Tensor) -> None:
        compute = compute_dtype(q.dtype)
        self.group = q.shape[1] // k.shape[1]
        # (B or 1, 1, G * Sq, Skv)
        self.seen = visible(inputs).repeat(1, self.group, 1).unsqueeze(1)
        self.k, self.v = k.to(compute), inputs.v.to(compute)
        self.q = self.rows(q.to(compute))
        self.dot = self.q @ self.k.transpose(-1, -2)
        scale = inputs.scale
        self.scale: float | Tensor = (
            self.rows(scale.to(compute).unsqueeze(-1)) if isinstance(scale, Tensor) else scale
        )
        t, self.factor = self.dot, self.scale
        if inputs.softcap is not None:
            t, self.factor = torch.tanh(self.scale * t / inputs.softcap), inputs.softcap
        self.t = t.masked_fill(~self.seen, -math.inf)

    def rows(self, x: Tensor) -> Tensor:
        """(B, Hq, Sq, X) as (B, Hkv, G * Sq, X)."""
        return x.unflatten(1, (-1, self.group)).flatten(2, 3)

    def heads(self, x: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return x.unflatten(2, (self.group, -1)).flatten(1, 2)

    def softmax_state(self) -> tuple[Tensor, Tensor]:
        """a and L of each row, (B, Hkv, G * Sq, 1); 0 and +inf where it sees no key."""
        empty = ~self.seen.any(-1, keepdim=True)
        t = pad(self.t, (0, 1), value=-math.inf)  # calls without keys have a maximum, too
        row_max = t.amax(-1, keepdim=True).masked_fill(empty, 0.0)
        row_sum = exponent(self.t, row_max, self.factor).exp2_().sum(-1, keepdim=True)
        return row_max, row_sum.log2().masked_fill(empty, math.inf)

    def probabilities(self, row_max: Tensor, log_sum: Tensor) -> Tensor:
        """P = 2 ** (exponent - L), 0 in empty rows and where nothing is seen."""
        return exponent(self.t, row_max, self.factor).sub_(log_sum).exp2_()


def weigh(weight: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """weight @ x over pairs that see each other; what is hidden may be NaN, its weight 0.

    weight (..., N, M), x (..., M, X), seen (..., N, M) bool.
    """
    finite = x.isfinite()
    if x.device.type == "cpu" and bool(finite.all()):
        return weight @ x
    reached = seen.to(x.dtype) @ (~finite).to(x.dtype) > 0  # (..., N, X) by something not finite
    return torch.where(reached, weight @ x, weight @ x.masked_fill(~finite, 0.0))


def forward(inputs: AttentionInputs, *, save_prepared: bool) -> ForwardResults:
    """out, lse and, where backward needs them, a and L, q' and k' (else size 0)."""
    if inputs.cu_seqlens_q is not None:
        return join_forward(inputs, forward, save_prepared=save_prepared)
    q, (q_prepared, k_prepared) = inputs.q, prepare(inputs)
    scores = _Scores(inputs, q_prepared, k_prepared)
    row_max, log_sum = scores.softmax_state()
    p = scores.probabilities(row_max, log_sum)
    acc_o = scores.heads(weigh(p, scores.v, scores.seen))
    out = empty_in_order_of(q, acc_o.shape).copy_(acc_o)
    row_lse = (row_max.double() * scores.factor + log_sum.double() * LN2).to(row_max.dtype)
    lse = scores.heads(row_lse.masked_fill(log_sum == math.inf, -math.inf)).squeeze(-1)
    softmax_state = q.new_empty(0, dtype=lse.dtype)
    if save_prepared:
        softmax_state = torch.stack([scores.heads(x).squeeze(-1) for x in (row_max, log_sum)])
    if inputs.rotation is None or not save_prepared:
        q_prepared, k_prepared = q.new_empty(0), q.new_empty(0)
    return out, lse, softmax_state, q_prepared, k_prepared


def backward(
    inputs: AttentionInputs,
    out: Tensor,
    softmax_state: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *,
    need_grad_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the input dtype, dscale like the scale tensor. inputs.q, inputs.k: q', k'."""
    if inputs.cu_seqlens_q is not None:
        return join_backward(
            inputs,
            out,
            softmax_state,
            grad_out,
            grad_lse,
            backward,
            need_grad_scale=need_grad_scale,
        )
    scores = _Scores(inputs, inputs.q, inputs.k)
    seen, seen_by = scores.seen, scores.seen.transpose(-1, -2)
    p = scores.probabilities(*(scores.rows(x.unsqueeze(-1)) for x in softmax_state))
    grad_o = scores.rows(grad_out.to(p.dtype))
    grad_v = weigh(p.transpose(-1, -2), grad_o, seen_by)
    grad_p = (grad_o @ scores.v.transpose(-1, -2)).masked_fill_(~seen, 0.0)
    delta = (p * grad_p).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - scores.rows(grad_lse.unsqueeze(-1))
    grad_s = (p * grad_p.sub_(delta)).masked_fill_(~seen, 0.0)
    if inputs.softcap is not None:
        grad_s = grad_s * (1 - scores.t.masked_fill(~seen, 0.0) ** 2)
    grad_dot = scores.scale * grad_s
    grad_q = scores.heads(weigh(grad_dot, scores.k, seen))
    grad_k = weigh(grad_dot.transpose(-1, -2), scores.q, seen_by)
    if inputs.rotation is not None:
        q_positions, k_positions = positions_of(inputs)
        grad_q = rotate(grad_q, q_positions, inputs.rotation, inverse=True)
        grad_k = rotate(grad_k, k_positions, inputs.rotation, inverse=True)
    grads = empty_gradients(inputs, out)
    for rounded, grad in zip(grads, (grad_q, grad_k, grad_v), strict=True):
        rounded.copy_(grad)
    grad_scale = empty_grad_scale(inputs, needed=need_grad_scale)
    if grad_scale.ndim == 3:
        terms = (grad_s * scores.dot.masked_fill(~seen, 0.0)).sum(-1, keepdim=True)
        grad_scale.copy_(scores.heads(terms).squeeze(-1))
    return *grads, grad_scale


# ---- decode ------------------------------------------------------------------------------------
def decode(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv), lse (B, Hq, Sq); the caches are written in place."""
    return append_and_attend(inputs, forward)


def append_and_attend(inputs: DecodeInputs, forward: Forward) -> tuple[Tensor, Tensor]:
    """Decode as an append, then the `forward` of a backend over plain keys.

    Rows whose append does not fit are not written and come back as NaN.
    """
    q, k, rotation = inputs.q, inputs.k, inputs.rotation
    start = inputs.cache_seqlens + inputs.num_new - q.shape[2]  # (B,) key index of query 0
    if rotation is not None and inputs.rotated_cache:
        q = _rotated(q, start, rotation)
        k = None if k is None else _rotated(k, inputs.cache_seqlens, rotation)
        rotation = None
    fits = _append(inputs, k)
    k_rows, v_rows = _rows_in_use(inputs)
    out, lse, *_ = forward(
        AttentionInputs(
            q=q,
            k=k_rows,
            v=v_rows,
            scale=inputs.scale,
            causal=True,
            window=inputs.window,
            softcap=inputs.softcap,
            q_start=start,
            kv_start=inputs.kv_start,
            kv_end=(inputs.cache_seqlens + inputs.num_new).clamp(0, k_rows.shape[2]),
            rotation=rotation,
        ),
        save_prepared=False,
    )
    if q.device.type == "cpu":  # an append beyond the capacity has been refused
        return out, lse
    lost = ~fits.view(-1, 1, 1)
    return out.masked_fill(lost.unsqueeze(-1), torch.nan), lse.masked_fill(lost, torch.nan)


def _rotated(x: Tensor, start: Tensor, rotation: Rotation) -> Tensor:
    """x (B, H, S, D) rotated at positions start + i, rounded once, in the memory order of x."""
    positions = start[:, None] + torch.arange(x.shape[2], device=x.device)
    rotated = rotate(x.to(compute_dtype(x.dtype)), positions, rotation)
    return empty_in_order_of(x, x.shape).copy_(rotated)


def _rows_in_use(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """k and v as (B, Hkv, rows, X), up to the longest row where the host may know it."""
    k_rows, v_rows, table = inputs.k_cache, inputs.v_cache, inputs.page_table
    longest = inputs.capacity
    if readable(inputs.cache_seqlens) and inputs.cache_seqlens.numel():
        longest = int(inputs.cache_seqlens.max()) + inputs.num_new
    if table is None:
        return k_rows[:, :, :longest], v_rows[:, :, :longest]
    table = table[:, : -(-longest // k_rows.shape[2])]
    return _gather(k_rows, table), _gather(v_rows, table)


def _gather(pages: Tensor, page_table: Tensor) -> Tensor:
    """(num_pages, H, page_size, D) as (B, H, pages_per_row * page_size, D)."""
    chosen = pages[page_table.clamp(0, max(pages.shape[0] - 1, 0)).long()]
    return chosen.transpose(1, 2).flatten(2, 3)


def _append(inputs: DecodeInputs, k: Tensor | None) -> Tensor:
    """Writes k and inputs.v behind each row's keys. (B,) bool: the rows that they fit into."""
    lengths, num_new, page_table = inputs.cache_seqlens, inputs.num_new, inputs.page_table
    fits = (lengths >= 0) & (lengths + num_new <= inputs.capacity)
    if k is None or inputs.v is None:
        return fits
    index = lengths[:, None].long() + torch.arange(num_new, device=k.device)  # (B, Snew)
    if page_table is None:
        page = torch.arange(k.shape[0], device=k.device)[:, None].expand_as(index)
        slot = index
    else:
        page_size = inputs.k_cache.shape[2]
        block = (index // page_size).clamp(0, page_table.shape[1] - 1)
        page, slot = page_table.long().gather(1, block), index % page_size
        fits = fits & ((page >= 0) & (page < inputs.k_cache.shape[0])).all(1)
    page, slot = page[fits].flatten(), slot[fits].flatten()
    for cache, new in ((inputs.k_cache, k), (inputs.v_cache, inputs.v)):
        cache[page, :, slot] = new[fits].transpose(1, 2).flatten(0, 1)
    return fits
