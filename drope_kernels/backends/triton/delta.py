"""The terms of each query that the backward pass needs besides its channels, delta above all:
delta_i = rowsum(dO_i * O_i) - dlse_i is subtracted from dP (FlashAttention-2, arXiv 2307.08691,
algorithm 2).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from drope_kernels.backends.triton.rows import load_tile, row_address
from drope_kernels.backends.triton.sequence import num_queries, query_index, work_tile
from drope_kernels.backends.triton.softmax import query_scale
from drope_kernels.backends.triton.unspecialized import plain_mask, plain_shape


class SavedTerms(NamedTuple):
    """Terms of queries in memory: row_max, log2_sum, -delta and, where it has rows, the scale."""

    ptr: Tensor  # (3 or 4, batch * num_heads_q, seqlen_q and a tile of any bits) float32
    stride_term: int
    stride_head: int  # a multiple of 16: aligned


class QueryTerms(NamedTuple):
    """A query besides its channels; each (BLOCK_Q,), (BLOCK_Q, 1) or (1, BLOCK_Q)."""

    row_max: tl.tensor  # with log2_sum what forward's softmax ended with
    log2_sum: tl.tensor  # +inf where it sees no key: p is 0
    minus_delta: tl.tensor
    scale: tl.tensor


@triton.jit(do_not_specialize=("num_tiles",))
def delta_kernel(
    out,  # (batch, num_heads_q, seqlen_q, head_dim_v)
    grad_out,  # likewise
    softmax_state,  # (2, batch, num_heads_q, seqlen_q) contiguous, float32
    grad_lse,  # (batch, num_heads_q, seqlen_q) contiguous, float32; None: 0
    terms,
    shape,
    mask,
    ranges,
    scale,
    num_tiles,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    shape, mask = plain_shape(shape), plain_mask(mask)
    program = tl.program_id(0)
    work = work_tile(shape, mask, ranges, program, shape.num_heads_q, num_tiles, False, BLOCK_Q)
    sequence, head = work.sequence, work.head
    row = tl.arange(0, BLOCK_Q)
    query = work.first + row
    is_query = query < sequence.seqlen_q
    index = query_index(shape, sequence, head, query)
    row_max = tl.load(softmax_state + index, mask=is_query, other=0.0)
    sums = softmax_state + num_queries(shape)
    log2_sum = tl.load(sums + index, mask=is_query, other=float("inf"))

    # What belongs to a query that sees no key may be anything, NaN too: it is not read.
    sees = log2_sum != float("inf")
    channel = tl.arange(0, BLOCK_DIM_V)
    first_row = sequence.first_q + work.first
    o_address = row_address(out, sequence.batch, head, first_row)
    o = load_tile(o_address, out.stride_row, row, sees, channel, HEAD_DIM_V)
    grad_o_address = row_address(grad_out, sequence.batch, head, first_row)
    grad_o = load_tile(grad_o_address, grad_out.stride_row, row, sees, channel, HEAD_DIM_V)
    delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + index, mask=sees, other=0.0)

    head_row = tl.cast(sequence.batch * shape.num_heads_q + head, tl.int64)
    target = terms.ptr + head_row * terms.stride_head + sequence.first_q + query
    tl.store(target, row_max, mask=is_query)
    tl.store(target + terms.stride_term, log2_sum, mask=is_query)
    tl.store(target + 2 * terms.stride_term, -delta, mask=is_query)
    if scale.rows is not None:
        logit_scale = query_scale(scale, sequence.batch, head, sequence.first_q + query, is_query)
        tl.store(target + 3 * terms.stride_term, logit_scale, mask=is_query)
