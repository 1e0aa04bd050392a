"""Tiles of rows between memory and registers.

A tile is (BLOCK_ROWS, BLOCK_DIM) with BLOCK_DIM a power of two >= DIM; channels from DIM on are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_address(x, batch, head, row):
    """The address of a row; `batch` and `row` are tensors, `x` is a `Rows`."""
    offset = tl.cast(batch, tl.int64) * x.stride_batch + tl.cast(head, tl.int64) * x.stride_head
    return x.ptr + offset + tl.cast(row, tl.int64) * x.stride_row


@triton.jit
def load_tile(address, stride_row, row, is_row, channel, DIM: tl.constexpr):
    """Rows `row` (BLOCK_ROWS,) behind `address`, at `channel` (BLOCK_DIM,); 0 where not is_row."""
    mask = is_row[:, None] & (channel < DIM)[None, :]
    return tl.load(address + row[:, None] * stride_row + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(address, stride_row, row, is_row, channel, tile, DIM: tl.constexpr):
    mask = is_row[:, None] & (channel < DIM)[None, :]
    target = address + row[:, None] * stride_row + channel[None, :]
    tl.store(target, tile.to(address.dtype.element_ty), mask=mask)
