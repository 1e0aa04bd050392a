"""Tiles of rows between memory and registers.

A tile is (BLOCK_ROWS, BLOCK_DIM) with BLOCK_DIM a power of two >= DIM; channels from DIM on are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class HeadRows(NamedTuple):
    """The rows of one head that a loop reads block by block."""

    address: tl.pointer_type  # of row 0
    stride_row: tl.tensor
    tma: tl.tensor_descriptor | None  # of the whole tensor; None: read through pointers
    batch: tl.tensor
    head: tl.tensor
    first: tl.tensor  # row 0 is this row of the tensor


@triton.jit
def row_address(x, batch, head, row):
    """The address of a row; `batch` and `row` are tensors, `x` is a `Rows`."""
    offset = tl.cast(batch, tl.int64) * x.stride_batch + tl.cast(head, tl.int64) * x.stride_head
    return x.ptr + offset + tl.cast(row, tl.int64) * x.stride_row


@triton.jit
def load_tile(address, stride_row, row, is_row, channel, DIM: tl.constexpr):
    """Rows `row` (BLOCK_ROWS,) behind `address`, at `channel` (BLOCK_DIM,); 0 where not is_row.

    is_row None: each is a row.
    """
    source = address + row[:, None] * stride_row + channel[None, :]
    if is_row is not None:
        tile = tl.load(source, mask=is_row[:, None] & (channel < DIM)[None, :], other=0.0)
    elif channel.shape[0] > DIM:
        tile = tl.load(source, mask=(channel < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(source)
    return tile


@triton.jit
def load_block(
    rows, block, is_row, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Block number `block` of rows; 0 where not is_row, and by TMA behind the last row."""
    first = block * BLOCK_ROWS
    if rows.tma is not None and is_row is None:
        tile = rows.tma.load([rows.batch, rows.head, rows.first + first, 0])
        tile = tl.reshape(tile, (BLOCK_ROWS, BLOCK_DIM))
    else:
        address = rows.address + tl.cast(first, tl.int64) * rows.stride_row
        row, channel = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)
        tile = load_tile(address, rows.stride_row, row, is_row, channel, DIM)
    return tile


@triton.jit
def store_tile(address, stride_row, row, is_row, channel, tile, DIM: tl.constexpr):
    mask = is_row[:, None] & (channel < DIM)[None, :]
    target = address + row[:, None] * stride_row + channel[None, :]
    tl.store(target, tile.to(address.dtype.element_ty), mask=mask)
