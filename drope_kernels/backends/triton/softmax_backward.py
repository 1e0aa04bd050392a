"""From scores to dS (FlashAttention-2, arXiv 2307.08691, algorithm 2): dS = p (dP - delta).

Tiles are (BLOCK_Q, BLOCK_KV), or transposed: the terms of their queries are a column or a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.delta import QueryTerms
from drope_kernels.backends.triton.mask import is_visible
from drope_kernels.backends.triton.softmax import LOG2_E, cap_scores, exponent, score_scale


@triton.jit
def load_terms(
    terms, terms_tma, scale, shape, sequence, head, first, is_query, BLOCK_Q: tl.constexpr
):
    """Terms of queries [first, first + BLOCK_Q) of the sequence; is_query None: each is a query.

    Of others row_max and log2_sum may be any bits: `probabilities` hides what comes of them.
    """
    row_max = _load_term(terms, terms_tma, 0, shape, sequence, head, first, BLOCK_Q)
    log2_sum = _load_term(terms, terms_tma, 1, shape, sequence, head, first, BLOCK_Q)
    minus_delta = _load_term(terms, terms_tma, 2, shape, sequence, head, first, BLOCK_Q)
    if scale.rows is not None:
        logit_scale = _load_term(terms, terms_tma, 3, shape, sequence, head, first, BLOCK_Q)
    else:
        logit_scale = tl.full((BLOCK_Q,), 1.0, tl.float32) * scale.value
    if is_query is not None:
        minus_delta = tl.where(is_query, minus_delta, 0.0)
        logit_scale = tl.where(is_query, logit_scale, 1.0)
    return QueryTerms(row_max, log2_sum, minus_delta, logit_scale)


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
    return QueryTerms(
        terms.row_max[:, None],
        terms.log2_sum[:, None],
        terms.minus_delta[:, None],
        terms.scale[:, None],
    )


@triton.jit
def as_row(terms):
    return QueryTerms(
        terms.row_max[None, :],
        terms.log2_sum[None, :],
        terms.minus_delta[None, :],
        terms.scale[None, :],
    )


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
    slope = 1.0
    t = acc_s
    if HAS_SOFTCAP:
        t = cap_scores(acc_s, terms.scale, softcap)
        slope = 1.0 - t * t
    scale_log2 = score_scale(terms.scale, softcap, HAS_SOFTCAP) * LOG2_E
    p = tl.exp2(exponent(t, terms.row_max, scale_log2) - terms.log2_sum)
    if MASKED:  # p, not t, as row_max and log2_sum of what is no query may be NaN
        p = tl.where(is_visible(visible, first_column, t.shape[1]), p, 0.0)
    return p, slope
