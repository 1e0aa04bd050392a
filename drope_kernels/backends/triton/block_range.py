"""Which keys a query sees, and what that leaves of the loop over kv (or, backward, q) blocks.

Every mask of a call is an interval of keys per query, and both ends of it never decrease from one
query to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from drope_kernels.backends.triton.sequence import clamp


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
def keys_of(sequence, mask, query):
    """The keys that `query` of the sequence sees."""
    index = sequence.q_start + query
    return IndexRange(
        clamp(index - mask.behind, sequence.kv_begin, sequence.kv_end),
        clamp(index + mask.ahead, sequence.kv_begin, sequence.kv_end),
    )


@triton.jit
def queries_of(sequence, mask, key):
    """The queries of the sequence that see `key`."""
    valid = (key >= sequence.kv_begin) & (key < sequence.kv_end)
    index = key - sequence.q_start
    begin = clamp(index - mask.ahead + 1, 0, sequence.seqlen_q)
    end = clamp(index + mask.behind + 1, 0, sequence.seqlen_q)
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
