"""Attention of one row of q over disjoint sets of keys, joined.

A part of the row has its row_max a_n, its row_sum and its out_n. The exponent of `softmax.py`
weighs what parts hold as it weighs keys, with w_n = 2^(scale_log2 (a_n - max a)):

    row_sum = sum_n w_n row_sum_n        out = sum_n w_n row_sum_n out_n / row_sum

Parts that saw no key have row_sum 0 and may leave their out unwritten; a part that is NaN makes the
whole NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.rows import row_address, store_tile
from drope_kernels.backends.triton.softmax import (
    LOG2_E,
    Softmax,
    finish,
    new_softmax,
    query_scale,
    score_scale,
    weigh,
)


@triton.jit(do_not_specialize=("num_heads_q", "seqlen_q", "num_rows", "num_parts"))
def merge_kernel(
    part_out,  # (num_parts, num_rows, head_dim_v) contiguous float32
    part_state,  # (2, num_parts, num_rows) contiguous: row_max, row_sum
    out,  # (batch, num_heads_q, seqlen_q, head_dim_v)
    lse,  # (num_rows,) contiguous; rows are those of out
    scale,
    num_heads_q,
    seqlen_q,
    num_rows,
    num_parts,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """A program joins the parts of one row."""
    row = tl.program_id(0)
    query, head, batch = (
        row % seqlen_q,
        row // seqlen_q % num_heads_q,
        row // seqlen_q // num_heads_q,
    )
    one, channel = tl.arange(0, 1), tl.arange(0, BLOCK_DIM_V)
    logit_scale = query_scale(scale, batch, head, query + one, one == 0)
    natural_scale = score_scale(logit_scale, scale.softcap, HAS_SOFTCAP)
    part_sums = part_state + tl.cast(num_parts, tl.int64) * num_rows

    softmax = new_softmax(1)
    acc_o = tl.zeros((1, BLOCK_DIM_V), tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        part_row = tl.cast(part, tl.int64) * num_rows + row
        sum_n = tl.load(part_sums + part_row, mask=part < num_parts, other=0.0)
        a_n = tl.load(part_state + part_row, mask=part < num_parts, other=0.0)
        has_keys = sum_n != 0.0
        a_n = tl.where(has_keys, a_n, float("-inf"))
        w_n, row_scale, row_max = weigh(softmax.row_max, a_n[None, :], natural_scale * LOG2_E)
        w_n *= sum_n[None, :]
        address = part_out + part_row[:, None] * HEAD_DIM_V + channel[None, :]
        is_written = has_keys[:, None] & (channel < HEAD_DIM_V)[None, :]
        out_n = tl.load(address, mask=is_written, other=0.0)
        joined = tl.sum(tl.reshape(w_n, (BLOCK_PARTS, 1)) * out_n, 0)
        acc_o = acc_o * row_scale[:, None] + joined[None, :]
        softmax = Softmax(row_max, softmax.row_sum * row_scale + tl.sum(w_n, 1))

    state = finish(softmax, natural_scale)
    address = row_address(out, batch, head, query)
    acc_o = acc_o * state.inverse[:, None]
    store_tile(address, out.stride_row, one, one == 0, channel, acc_o, HEAD_DIM_V)
    tl.store(lse + row + one, state.lse)
