"""Attention over disjoint sets of keys, joined: lse = log sum_n exp(lse_n) and
out = sum_n exp(lse_n - lse) out_n, as drope_kernels/merge.py.

Parts that saw no key have lse -inf and may leave their out unwritten; a part that is NaN makes the
whole NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.rows import row_address, store_tile
from drope_kernels.backends.triton.softmax import LN_2, LOG2_E, NO_SCORE


@triton.jit
def exp2_of(lse, shift):
    """exp(lse - shift), 0 where lse is -inf whatever the shift."""
    return tl.where(lse == float("-inf"), 0.0, tl.exp2((lse - shift) * LOG2_E))


@triton.jit(do_not_specialize=("num_heads_q", "seqlen_q", "num_rows", "num_parts"))
def merge_kernel(
    part_out,  # (num_parts, num_rows, head_dim_v) contiguous float32
    part_lse,  # (num_parts, num_rows) contiguous
    out,  # (batch, num_heads_q, seqlen_q, head_dim_v)
    lse,  # (num_rows,) contiguous; rows are those of out
    num_heads_q,
    seqlen_q,
    num_rows,
    num_parts,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """A program joins the parts of one row."""
    row = tl.program_id(0)
    channel = tl.arange(0, BLOCK_DIM_V)
    row_max = tl.full((1,), NO_SCORE, tl.float32)
    row_sum = tl.zeros((1,), tl.float32)
    acc_o = tl.zeros((1, BLOCK_DIM_V), tl.float32)
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        part_row = tl.cast(part, tl.int64) * num_rows + row
        lse_n = tl.load(part_lse + part_row, mask=part < num_parts, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(lse_n, 0))
        weight, row_scale = exp2_of(lse_n, new_max), exp2_of(row_max, new_max)
        is_written = (lse_n != float("-inf"))[:, None] & (channel < HEAD_DIM_V)[None, :]
        address = part_out + part_row[:, None] * HEAD_DIM_V + channel[None, :]
        out_n = tl.load(address, mask=is_written, other=0.0)
        acc_o = acc_o * row_scale[:, None] + tl.sum(weight[:, None] * out_n, 0)[None, :]
        row_sum = row_sum * row_scale + tl.sum(weight, 0)
        row_max = new_max

    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    row_lse = tl.where(is_empty, float("-inf"), row_max + tl.log2(row_sum) * LN_2)
    query, head = row % seqlen_q, row // seqlen_q
    address = row_address(out, head // num_heads_q, head % num_heads_q, query)
    one = tl.arange(0, 1)
    acc_o = acc_o / row_sum[:, None]
    store_tile(address, out.stride_row, one, one == 0, channel, acc_o, HEAD_DIM_V)
    tl.store(lse + row + one, row_lse)
