"""From scores to dS (FlashAttention-2, arXiv 2307.08691, algorithm 2): dS = p (dP - delta).

Tiles are (BLOCK_Q, BLOCK_KV), or transposed: the terms of their queries are a column or a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.delta import QueryTerms
from drope_kernels.backends.triton.mask import mask_scores
from drope_kernels.backends.triton.softmax import LOG2_E, tanh


@triton.jit
def load_terms(
    terms, terms_tma, scale, shape, sequence, head, first, is_query, BLOCK_Q: tl.constexpr
):
    """Terms of queries [first, first + BLOCK_Q) of the sequence; is_query None: each is a query."""
    minus_lse_log2 = _load_term(terms, terms_tma, 0, shape, sequence, head, first, BLOCK_Q)
    delta = _load_term(terms, terms_tma, 1, shape, sequence, head, first, BLOCK_Q)
    if scale.rows is not None:
        row_scale = _load_term(terms, terms_tma, 2, shape, sequence, head, first, BLOCK_Q)
        # 0 behind the last query: times a hidden score of -inf it would be NaN.
        row_scale = tl.where(row_scale > 0.0, row_scale, 1.0)
    else:
        row_scale = tl.full((BLOCK_Q,), 1.0, tl.float32) * scale.value
    if is_query is not None:
        minus_lse_log2 = tl.where(is_query, minus_lse_log2, float("-inf"))
        delta = tl.where(is_query, delta, 0.0)
        row_scale = tl.where(is_query, row_scale, 1.0)
    return QueryTerms(minus_lse_log2, delta, row_scale)


@triton.jit
def _load_term(
    terms, terms_tma, TERM: tl.constexpr, shape, sequence, head, first, BLOCK_Q: tl.constexpr
):
    """Without a mask, which would keep it from reading more than a number at a time."""
    query = sequence.first_q + first
    head_row = sequence.batch * shape.num_heads_q + head
    if terms_tma is not None:
        term = tl.reshape(terms_tma.load([TERM, head_row, query]), (BLOCK_Q,))
    else:
        address = terms.ptr + tl.cast(head_row, tl.int64) * terms.stride_head + query
        term = tl.load(address + TERM * terms.stride_term + tl.arange(0, BLOCK_Q))
    return term


@triton.jit
def as_column(terms):
    return QueryTerms(terms.minus_lse_log2[:, None], terms.delta[:, None], terms.scale[:, None])


@triton.jit
def as_row(terms):
    return QueryTerms(terms.minus_lse_log2[None, :], terms.delta[None, :], terms.scale[None, :])


@triton.jit
def probabilities(
    acc_s,
    terms,
    softcap,
    visible,
    first_column,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """p of raw scores q'.k', and the slope of their softcap, a factor of dS.

    visible: the columns that see each row, or are seen by it, as `mask_scores` counts them.
    """
    scale_log2 = terms.scale * LOG2_E
    slope = 1.0
    if HAS_SOFTCAP:
        fraction = tanh(acc_s * (terms.scale / softcap))
        slope = 1.0 - fraction * fraction
        acc_s = softcap * fraction
        scale_log2 = tl.full(terms.scale.shape, LOG2_E, tl.float32)
    if MASKED:
        acc_s = mask_scores(acc_s, visible, first_column, acc_s.shape[1])
    return tl.exp2(tl.fma(acc_s, scale_log2, terms.minus_lse_log2)), slope
