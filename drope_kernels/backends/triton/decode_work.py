"""What one program of a decode call works on: rows of one kv head, and one part of their keys.

Rows are the (query, q head of the group) pairs of a kv head, the heads of a query side by side, so
that all of them read the keys once.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from drope_kernels.backends.triton.block_range import IndexRange
from drope_kernels.backends.triton.kv_cache import held_keys
from drope_kernels.backends.triton.sequence import Sequence, clamp


class GroupRows(NamedTuple):
    head: tl.tensor  # (BLOCK_Q,) of q
    query: tl.tensor  # (BLOCK_Q,)
    is_row: tl.tensor  # (BLOCK_Q,)
    first_query: tl.tensor


class DecodeWork(NamedTuple):
    sequence: Sequence  # its queries end with the tile's last one
    fits: tl.tensor  # otherwise the row of the batch has no results
    kv_head: tl.tensor
    split: tl.tensor
    rows: GroupRows


@triton.jit
def group_rows(shape, kv_head, tile, BLOCK_Q: tl.constexpr):
    group = shape.num_heads_q // shape.num_heads_kv
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head, query = kv_head * group + row % group, row // group
    return GroupRows(head, query, query < shape.seqlen_q, tile * BLOCK_Q // group)


@triton.jit
def group_offsets(x, batch, rows):
    """Offsets (BLOCK_Q,) of the rows in `x` (batch, num_heads_q, seqlen_q, channels)."""
    offset = tl.cast(batch, tl.int64) * x.stride_batch
    offset += tl.cast(rows.head, tl.int64) * x.stride_head
    return offset + tl.cast(rows.query, tl.int64) * x.stride_row


@triton.jit
def decode_work(shape, ranges, num_keys, num_tiles, num_splits, BLOCK_Q: tl.constexpr):
    """Tiles that read the same keys are neighbours; those that see most of them come first."""
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    split = program // num_tiles % num_splits
    kv_head = program // num_tiles // num_splits % shape.num_heads_kv
    batch = program // num_tiles // num_splits // shape.num_heads_kv
    rows = group_rows(shape, kv_head, tile, BLOCK_Q)
    group = shape.num_heads_q // shape.num_heads_kv
    end_query = tl.minimum((tile * BLOCK_Q + BLOCK_Q - 1) // group + 1, shape.seqlen_q)

    held = held_keys(num_keys, batch, shape.seqlen_kv)
    zero = batch * 0
    kv_begin = zero
    if ranges.kv_start is not None:
        kv_begin = clamp(tl.load(ranges.kv_start + batch), 0, shape.seqlen_kv)
    sequence = Sequence(
        batch,
        zero,
        zero,
        end_query,
        zero + shape.seqlen_kv,
        held.end - shape.seqlen_q,
        kv_begin,
        held.end,
    )
    return DecodeWork(sequence, held.fits, kv_head, split, rows)


@triton.jit
def kv_blocks_of(keys, split, num_splits, BLOCK_KV: tl.constexpr):
    """Part `split` of the blocks that hold `keys`; the first parts are longer, if they differ."""
    first = keys.begin // BLOCK_KV
    num_blocks = (keys.end + BLOCK_KV - 1) // BLOCK_KV - first
    num_blocks = tl.where(keys.begin < keys.end, num_blocks, 0)
    size, longer = num_blocks // num_splits, num_blocks % num_splits
    begin = first + split * size + tl.minimum(split, longer)
    return IndexRange(begin, begin + size + tl.where(split < longer, 1, 0))
