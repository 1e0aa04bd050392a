"""The running softmax of a tile of queries in base 2 (FlashAttention-2, arXiv 2307.08691, alg. 1).

p_ij = exp2(scale_log2_i acc_s_ij - row_max_i); row_max is in units of log2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# The row_max of a row that has seen no key: below every score, and finite, as -inf - -inf is NaN.
NO_SCORE = tl.constexpr(-(2.0**127))


class Softmax(NamedTuple):
    row_max: tl.tensor  # (BLOCK_Q,)
    row_sum: tl.tensor  # (BLOCK_Q,)


@triton.jit
def query_scale(scale, sequence, head, query, is_query):
    """The logit scale of each query (BLOCK_Q,) of the sequence; 1 where there is no query."""
    if scale.rows is not None:
        offset = tl.cast(sequence.batch, tl.int64) * scale.stride_batch
        offset += tl.cast(head, tl.int64) * scale.stride_head
        row = tl.cast(sequence.first_q + query, tl.int64) * scale.stride_row
        return tl.load(scale.rows + offset + row, mask=is_query, other=1.0)
    return tl.zeros_like(query).to(tl.float32) + scale.value


@triton.jit
def new_softmax(BLOCK_Q: tl.constexpr):
    return Softmax(tl.full((BLOCK_Q,), NO_SCORE, tl.float32), tl.zeros((BLOCK_Q,), tl.float32))


@triton.jit
def update(softmax, acc_s, scale_log2):
    """The p of raw scores q'.k', what acc_o so far must be multiplied by, and the new state.

    scale_log2 (BLOCK_Q,) is scale_i log2(e) > 0.
    """
    row_max = tl.maximum(softmax.row_max, tl.max(acc_s, 1) * scale_log2)
    row_scale = tl.exp2(softmax.row_max - row_max)
    p = tl.exp2(tl.fma(acc_s, scale_log2[:, None], -row_max[:, None]))
    row_sum = softmax.row_sum * row_scale + tl.sum(p, 1)
    return p, row_scale, Softmax(row_max, row_sum)


@triton.jit
def finish(softmax):
    """1 / row_sum and lse (BLOCK_Q,); 0 and -inf in rows that saw no key."""
    is_empty = softmax.row_sum == 0.0  # the largest score alone gives 1
    row_sum = tl.where(is_empty, 1.0, softmax.row_sum)
    lse = (softmax.row_max + tl.log2(row_sum)) * LN_2
    return tl.where(is_empty, 0.0, 1.0 / row_sum), tl.where(is_empty, float("-inf"), lse)


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
def cap_scores(acc_s, scale, softcap):
    """softcap tanh(scale_i acc_s / softcap), to which a scale_log2 of log2(e) belongs."""
    return softcap * tanh(acc_s * (scale / softcap)[:, None])
