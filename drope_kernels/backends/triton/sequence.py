"""One row of the batch, or one sequence of a packed call: where its rows lie and what it may see.

Values that the caller keeps on the device (cu_seqlens, q_start, kv_start, kv_end) are clamped to
the tensors, so that no value of theirs can lead outside.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from drope_kernels.backends.triton.params import MAX_SEQLEN

# Sequences that a search for a tile looks at in one step.
_SEARCH_WIDTH = tl.constexpr(128)
# Bounds of key indices that queries count from: beyond them every key, or none, is seen.
FARTHEST = tl.constexpr(MAX_SEQLEN)


class Sequence(NamedTuple):
    batch: tl.tensor  # index of strides; 0 in packed calls
    first_q: tl.tensor  # its first rows; 0 unless packed
    first_k: tl.tensor
    seqlen_q: tl.tensor
    seqlen_kv: tl.tensor
    q_start: tl.tensor  # key index of query 0
    kv_begin: tl.tensor  # valid keys
    kv_end: tl.tensor


class WorkTile(NamedTuple):
    sequence: Sequence
    head: tl.tensor  # of q or of k, v: whichever the kernel asked for
    first: tl.tensor  # row of the sequence at which the tile begins; may lie past its end


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def num_queries(shape):
    """Length of contiguous arrays (batch, num_heads_q, seqlen_q)."""
    return tl.cast(shape.batch * shape.num_heads_q, tl.int64) * shape.seqlen_q


@triton.jit
def query_index(shape, sequence, head, query):
    """Index in such arrays of queries of the sequence."""
    head_row = tl.cast(sequence.batch * shape.num_heads_q + head, tl.int64)
    return head_row * shape.seqlen_q + sequence.first_q + query


@triton.jit
def batch_row(shape, mask, ranges, batch):
    zero = batch * 0
    q_start = zero + mask.q_offset
    kv_begin = zero
    kv_end = zero + shape.seqlen_kv
    if ranges.q_start is not None:
        q_start = tl.load(ranges.q_start + batch)
    if ranges.kv_start is not None:
        kv_begin = clamp(tl.load(ranges.kv_start + batch), 0, shape.seqlen_kv)
    if ranges.kv_end is not None:
        kv_end = clamp(tl.load(ranges.kv_end + batch), 0, shape.seqlen_kv)
    return Sequence(
        batch, zero, zero, zero + shape.seqlen_q, zero + shape.seqlen_kv, q_start, kv_begin, kv_end
    )


@triton.jit
def packed_sequence(shape, ranges, index):
    """Sequence `index` of a packed call; one past the last has no rows."""
    exists = index < shape.num_seqs
    begin_q = clamp(tl.load(ranges.cu_seqlens_q + index), 0, shape.seqlen_q)
    begin_k = clamp(tl.load(ranges.cu_seqlens_k + index), 0, shape.seqlen_kv)
    end_q = tl.load(ranges.cu_seqlens_q + index + 1, mask=exists, other=0)
    end_k = tl.load(ranges.cu_seqlens_k + index + 1, mask=exists, other=0)
    seqlen_q = clamp(end_q, begin_q, shape.seqlen_q) - begin_q
    seqlen_kv = clamp(end_k, begin_k, shape.seqlen_kv) - begin_k
    zero = index * 0
    q_start = seqlen_kv - seqlen_q
    return Sequence(zero, begin_q, begin_k, seqlen_q, seqlen_kv, q_start, zero, seqlen_kv)


@triton.jit
def find_packed_tile(cu_seqlens, num_rows, num_seqs, tile, BLOCK: tl.constexpr):
    """The sequence that tile number `tile` belongs to (num_seqs: none), and which of its own."""
    index = tile * 0
    first_tile = tile * 0  # of sequence `index`
    searching = num_seqs > 0
    while searching:
        seqs = index + tl.arange(0, _SEARCH_WIDTH)
        begin = clamp(tl.load(cu_seqlens + seqs, mask=seqs < num_seqs, other=0), 0, num_rows)
        end = clamp(tl.load(cu_seqlens + seqs + 1, mask=seqs < num_seqs, other=0), begin, num_rows)
        num_tiles = (end - begin + BLOCK - 1) // BLOCK
        last_tile = first_tile + tl.cumsum(num_tiles, 0)
        num_before = tl.sum((last_tile <= tile).to(tl.int32), 0)
        first_tile += tl.sum(tl.where(last_tile <= tile, num_tiles, 0), 0)
        index += num_before
        searching = (num_before == _SEARCH_WIDTH) & (index < num_seqs)
    return tl.minimum(index, num_seqs), tile - first_tile


@triton.jit
def work_tile(
    shape, mask, ranges, program, num_heads, num_tiles, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr
):
    """The tile of BLOCK queries, or with OF_KEYS of keys, that program number `program` works on.

    Tiles of one head follow each other, so that they share what they read in the L2 cache.
    num_tiles: of one head and batch row, or of one head over all sequences of a packed call.
    """
    tile = program % num_tiles
    head = program // num_tiles % num_heads
    if ranges.cu_seqlens_q is not None:
        cu_seqlens = ranges.cu_seqlens_k if OF_KEYS else ranges.cu_seqlens_q
        num_rows = shape.seqlen_kv if OF_KEYS else shape.seqlen_q
        index, tile = find_packed_tile(cu_seqlens, num_rows, shape.num_seqs, tile, BLOCK)
        sequence = packed_sequence(shape, ranges, index)
    else:
        sequence = batch_row(shape, mask, ranges, program // num_tiles // num_heads)
    return WorkTile(sequence, head, tile * BLOCK)
