"""Which keys a query sees, and what that leaves of the loop over kv (or, backward, q) blocks.

Every mask of a call is an interval of keys per query, and both ends of it never decrease from one
query to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from drope_kernels.backends.triton.sequence import FARTHEST, clamp


class IndexRange(NamedTuple):
    """Keys, or queries, begin up to end; a number of each, or one for every row of a tile."""

    begin: tl.tensor
    end: tl.tensor


class BlockRange(NamedTuple):
    """begin <= full_begin <= full_end <= end; blocks full_begin up to full_end need no mask."""

    begin: tl.tensor
    full_begin: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


@triton.jit
def _keys_of_first(sequence, mask):
    """The keys that query 0 sees, were there keys everywhere; query i sees those i further on."""
    index = tl.cast(sequence.q_start, tl.int64)
    begin = clamp(index - mask.behind, -FARTHEST, FARTHEST)
    end = clamp(index + mask.ahead, -FARTHEST, FARTHEST)
    return IndexRange(tl.cast(begin, tl.int32), tl.cast(end, tl.int32))


@triton.jit
def keys_of(sequence, mask, query):
    """The keys that `query` of the sequence sees."""
    first = _keys_of_first(sequence, mask)
    return IndexRange(
        clamp(first.begin + query, sequence.kv_begin, sequence.kv_end),
        clamp(first.end + query, sequence.kv_begin, sequence.kv_end),
    )


@triton.jit
def queries_of(sequence, mask, key):
    """The queries of the sequence that see `key`."""
    valid = (key >= sequence.kv_begin) & (key < sequence.kv_end)
    first = _keys_of_first(sequence, mask)
    begin = clamp(key - first.end + 1, 0, sequence.seqlen_q)
    end = clamp(key - first.begin + 1, 0, sequence.seqlen_q)
    return IndexRange(tl.where(valid, begin, 0), tl.where(valid, end, 0))


@triton.jit
def keys_of_tile(sequence, mask, first, BLOCK_Q: tl.constexpr):
    """The keys that any of queries [first, first + BLOCK_Q) sees."""
    last = tl.minimum(first + BLOCK_Q, sequence.seqlen_q) - 1
    begin = keys_of(sequence, mask, first).begin
    end = keys_of(sequence, mask, last).end
    return IndexRange(begin, tl.where(first > last, begin, tl.maximum(begin, end)))


@triton.jit
def queries_of_tile(sequence, mask, first, BLOCK_KV: tl.constexpr):
    """The queries that see any of keys [first, first + BLOCK_KV)."""
    first_key = tl.maximum(first, sequence.kv_begin)
    last_key = tl.minimum(first + BLOCK_KV, sequence.kv_end) - 1
    begin = queries_of(sequence, mask, first_key).begin
    end = queries_of(sequence, mask, last_key).end
    return IndexRange(begin, tl.where(first_key > last_key, begin, tl.maximum(begin, end)))


@triton.jit
def kv_blocks(sequence, mask, first, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The kv blocks that queries [first, first + BLOCK_Q) see."""
    last = tl.minimum(first + BLOCK_Q, sequence.seqlen_q) - 1
    seen = keys_of_tile(sequence, mask, first, BLOCK_Q)
    all_begin = keys_of(sequence, mask, last).begin
    all_end = keys_of(sequence, mask, first).end
    return _blocks(seen, all_begin, all_end, BLOCK_KV)


@triton.jit
def q_blocks(sequence, mask, first, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The q blocks that see keys [first, first + BLOCK_KV)."""
    seeing = queries_of_tile(sequence, mask, first, BLOCK_KV)
    last = first + BLOCK_KV - 1
    all_begin = queries_of(sequence, mask, last).begin
    all_end = queries_of(sequence, mask, first).end
    all_valid = (first >= sequence.kv_begin) & (last < sequence.kv_end)
    return _blocks(seeing, all_begin, tl.where(all_valid, all_end, 0), BLOCK_Q)


@triton.jit
def _blocks(some, all_begin, all_end, BLOCK: tl.constexpr):
    """Blocks of the indices `some`; full ones lie within [all_begin, all_end)."""
    is_empty = some.begin >= some.end
    begin = tl.where(is_empty, 0, some.begin // BLOCK)
    end = tl.where(is_empty, 0, (some.end + BLOCK - 1) // BLOCK)
    full_begin = clamp((all_begin + BLOCK - 1) // BLOCK, begin, end)
    full_end = clamp(all_end // BLOCK, full_begin, end)
    return BlockRange(begin, full_begin, full_end, end)


@triton.jit
def count_blocks(blocks, MASKED: tl.constexpr):
    """How many blocks need a mask, before the full ones and behind them, or how many need none."""
    num_full = blocks.full_end - blocks.full_begin
    if MASKED:
        return blocks.end - blocks.begin - num_full
    return num_full


@triton.jit
def nth_block(blocks, n, MASKED: tl.constexpr):
    """The n-th of the blocks that `count_blocks` counts."""
    if MASKED:
        block = blocks.begin + n
        return tl.where(
            block < blocks.full_begin, block, block + blocks.full_end - blocks.full_begin
        )
    return blocks.full_begin + n
