"""The running softmax of a tile of queries in base 2 (FlashAttention-2, arXiv 2307.08691, alg. 1).

t_ij is a score as it enters the softmax, in float32: q'_i.k'_j, or with a softcap the tanh of its
scaled share of it. p_ij = exp2(exponent(t_ij)), in forward, backward and decode; row_max is a t.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The row_max of a row that has seen no key. No score is below it, so one that equals it is right
# too; and it has differences, where -inf - -inf is NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Softmax(NamedTuple):
    row_max: tl.tensor  # (BLOCK_Q,) the largest t so far, or LOWEST
    row_sum: tl.tensor  # (BLOCK_Q,) of p


class SoftmaxState(NamedTuple):
    """What a row's softmax ended with; each (BLOCK_Q,)."""

    inverse: tl.tensor  # 1 / row_sum; 0 in rows that saw no key
    row_max: tl.tensor  # 0 there
    log2_sum: tl.tensor  # of row_sum; +inf there, so that every p / row_sum is 0
    lse: tl.tensor  # natural; -inf there


@triton.jit
def query_scale(scale, batch, head, row, is_row):
    """The logit scale (BLOCK_Q,) of rows of q; 1 where there is none."""
    if scale.rows is not None:
        offset = tl.cast(batch, tl.int64) * scale.stride_batch
        offset += tl.cast(head, tl.int64) * scale.stride_head
        offset += tl.cast(row, tl.int64) * scale.stride_row
        return tl.load(scale.rows + offset, mask=is_row, other=1.0)
    return tl.zeros_like(row).to(tl.float32) + scale.value


@triton.jit
def score_scale(logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """What turns t of queries with these scales into scores in natural units."""
    if HAS_SOFTCAP:
        return tl.zeros_like(logit_scale) + softcap
    return logit_scale


@triton.jit
def exponent(t, row_max, scale_log2):
    """Never above 0, and exactly 0 for the largest t, however large; -inf where they overflow.

    scale_log2 > 0: score_scale times log2(e). A fused scale_log2 t - base would be off by the
    rounding of base, which at scores of 1e9 is hundreds of octaves.
    """
    return scale_log2 * (t - row_max)


@triton.jit
def new_softmax(BLOCK_Q: tl.constexpr):
    return Softmax(tl.full((BLOCK_Q,), LOWEST, tl.float32), tl.zeros((BLOCK_Q,), tl.float32))


@triton.jit
def weigh(row_max, t, scale_log2):
    """The p of scores t (BLOCK_Q, columns), what sums so far must be multiplied by, and row_max."""
    new_max = tl.maximum(row_max, tl.max(t, 1))
    row_scale = tl.exp2(exponent(row_max, new_max, scale_log2))
    p = tl.exp2(exponent(t, new_max[:, None], scale_log2[:, None]))
    return p, row_scale, new_max


@triton.jit
def update(softmax, t, scale_log2):
    """The p of scores t, what acc_o so far must be multiplied by, and the new state."""
    p, row_scale, row_max = weigh(softmax.row_max, t, scale_log2)
    return p, row_scale, Softmax(row_max, softmax.row_sum * row_scale + tl.sum(p, 1))


@triton.jit
def finish(softmax, score_scale):
    """score_scale (BLOCK_Q,) as of the function of that name."""
    is_empty = softmax.row_sum == 0.0  # the largest score alone gives 1
    row_max = tl.where(is_empty, 0.0, softmax.row_max)
    row_sum = tl.where(is_empty, 1.0, softmax.row_sum)
    log2_sum = tl.log2(row_sum)
    lse = tl.fma(score_scale, row_max, log2_sum * LN_2)
    return SoftmaxState(
        tl.where(is_empty, 0.0, 1.0 / row_sum),
        row_max,
        tl.where(is_empty, float("inf"), log2_sum),
        tl.where(is_empty, float("-inf"), lse),
    )


@triton.jit
def tanh(x):
    """tanh by exp2; an odd polynomial near 0, where the quotient would cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    magnitude = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -magnitude, magnitude)
    x2 = x * x
    near = x + x * x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def cap_scores(acc_s, logit_scale, softcap):
    """t of raw scores: tanh(logit_scale_i acc_s / softcap).

    logit_scale: (BLOCK_Q, 1), or (1, BLOCK_Q) where scores stand transposed. Its quotient with a
    softcap near the end of float32 would have no digits left.
    """
    return tanh(acc_s * logit_scale * (1.0 / softcap))
