"""Attention backward (FlashAttention-2, arXiv 2307.08691, algorithm 2): dk and dv.

A program owns BLOCK_KV keys of one kv head and passes over the queries of all heads of its group
that see them, so that dk and dv never leave registers. Scores are computed transposed, (keys,
queries), so that p and dS are the left operands of dv += p dO and dk += dS q.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from drope_kernels.backends.triton.block_range import (
    IndexRange,
    count_blocks,
    keys_of_tile,
    nth_block,
    q_blocks,
    queries_of,
    queries_of_tile,
)
from drope_kernels.backends.triton.delta import SavedTerms
from drope_kernels.backends.triton.grad_rows import restore
from drope_kernels.backends.triton.params import Rows, ScaleParams, ShapeParams
from drope_kernels.backends.triton.rotary import key_positions
from drope_kernels.backends.triton.rows import (
    HeadRows,
    load_block,
    load_tile,
    row_address,
    store_tile,
)
from drope_kernels.backends.triton.schedule import scheduled_tile
from drope_kernels.backends.triton.sequence import Sequence, work_tile
from drope_kernels.backends.triton.softmax_backward import (
    as_row,
    load_terms,
    probabilities,
)
from drope_kernels.backends.triton.unspecialized import plain_mask, plain_schedule, plain_shape


class Keys(NamedTuple):
    """A tile of keys, and who sees them."""

    k: tl.tensor  # (BLOCK_KV, BLOCK_DIM), rotated
    v: tl.tensor  # (BLOCK_KV, BLOCK_DIM_V)
    queries: IndexRange  # that see each key
    tile_queries: IndexRange  # that see any of them


class QuerySource(NamedTuple):
    """Where the queries of a sequence are."""

    q: Rows
    q_tma: tl.tensor_descriptor | None
    grad_out: Rows
    grad_out_tma: tl.tensor_descriptor | None
    terms: SavedTerms
    terms_tma: tl.tensor_descriptor | None
    scale: ScaleParams
    shape: ShapeParams
    sequence: Sequence


class QueryBlock(NamedTuple):
    q: tl.tensor  # (BLOCK_Q, BLOCK_DIM), rotated
    grad_o: tl.tensor  # (BLOCK_Q, BLOCK_DIM_V)


@triton.jit
def load_queries(
    source,
    head,
    q_block,
    is_query,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
):
    """Block number `q_block` of a head; zeros where not is_query."""
    sequence, q, grad_out = source.sequence, source.q, source.grad_out
    batch, first = sequence.batch, sequence.first_q
    q_address = row_address(q, batch, head, first)
    q_rows = HeadRows(q_address, q.stride_row, source.q_tma, batch, head, first)
    o_address = row_address(grad_out, batch, head, first)
    o_rows = HeadRows(o_address, grad_out.stride_row, source.grad_out_tma, batch, head, first)
    return QueryBlock(
        load_block(q_rows, q_block, is_query, HEAD_DIM, BLOCK_Q, BLOCK_DIM),
        load_block(o_rows, q_block, is_query, HEAD_DIM_V, BLOCK_Q, BLOCK_DIM_V),
    )


@triton.jit
def load_terms_of(source, head, first, is_query, BLOCK_Q: tl.constexpr):
    """Terms (1, BLOCK_Q) of queries [first, first + BLOCK_Q)."""
    terms = load_terms(
        source.terms,
        source.terms_tma,
        source.scale,
        source.shape,
        source.sequence,
        head,
        first,
        is_query,
        BLOCK_Q,
    )
    return as_row(terms)


@triton.jit
def pass_queries(
    acc_dk,
    acc_dv,
    keys,
    source,
    kv_head,
    blocks,
    MASKED: tl.constexpr,
    HAS_BLIND_QUERIES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Passes over the q blocks that need a mask, or over those that need none, head by head."""
    BLOCK_DIM: tl.constexpr = keys.k.shape[1]
    BLOCK_DIM_V: tl.constexpr = keys.v.shape[1]
    group = source.shape.num_heads_q // source.shape.num_heads_kv
    num_blocks = count_blocks(blocks, MASKED)
    first_step = kv_head * group * num_blocks
    for step in tl.range(first_step, first_step + group * num_blocks):
        head = step // num_blocks
        q_block = nth_block(blocks, step - head * num_blocks, MASKED)
        first = q_block * BLOCK_Q
        is_query = None
        # Queries that see no key may hold NaN, which p and dS of 0 would not keep out.
        if MASKED and (source.q_tma is None or HAS_BLIND_QUERIES):
            query = first + tl.arange(0, BLOCK_Q)
            is_query = (query >= keys.tile_queries.begin) & (query < keys.tile_queries.end)
        block = load_queries(
            source, head, q_block, is_query, HEAD_DIM, HEAD_DIM_V, BLOCK_Q, BLOCK_DIM, BLOCK_DIM_V
        )
        q, grad_o = block.q, block.grad_o

        acc_s = tl.dot(keys.k, tl.trans(q), input_precision=PRECISION)
        # Not before: terms are as wide as the block, and registers are few.
        terms = load_terms_of(source, head, first, is_query, BLOCK_Q)
        p, slope = probabilities(
            acc_s, terms, source.scale.softcap, keys.queries, first, MASKED, HAS_SOFTCAP
        )
        acc_dv = tl.dot(p.to(grad_o.dtype), grad_o, acc_dv, input_precision=PRECISION)
        # dP begins with -delta: what is subtracted from it would take registers of its own.
        acc_dp = tl.broadcast_to(terms.minus_delta, acc_s.shape)
        acc_dp = tl.dot(keys.v, tl.trans(grad_o), acc_dp, input_precision=PRECISION)
        grad_s = p * acc_dp * slope
        if source.scale.rows is not None:  # by a factor near 1: small float16 numbers lose digits
            grad_s *= terms.scale * HEAD_DIM**0.5
        acc_dk = tl.dot(grad_s.to(q.dtype), q, acc_dk, input_precision=PRECISION)

    return acc_dk, acc_dv


@triton.jit
def backward_kernel(
    q,  # (batch, num_heads_q, seqlen_q, head_dim), rotated
    k,  # (batch, num_heads_kv, seqlen_kv, head_dim), rotated
    v,  # (batch, num_heads_kv, seqlen_kv, head_dim_v)
    grad_out,  # (batch, num_heads_q, seqlen_q, head_dim_v)
    terms,
    q_tma,  # q, grad_out and terms in blocks of BLOCK_Q queries; None: no TMA
    grad_out_tma,
    terms_tma,
    grad_k,  # like k
    grad_v,  # like v
    shape,
    mask,
    ranges,
    scale,
    rotary,
    schedule,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BLIND_QUERIES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    shape, mask = plain_shape(shape), plain_mask(mask)
    schedule = plain_schedule(schedule)
    head_row, tile = scheduled_tile(schedule, tl.program_id(0))
    # The first keys are seen by most queries.
    program = (head_row + 1) * schedule.num_tiles - 1 - tile
    work = work_tile(
        shape, mask, ranges, program, shape.num_heads_kv, schedule.num_tiles, True, BLOCK_KV
    )
    sequence, kv_head = work.sequence, work.head
    row = tl.arange(0, BLOCK_KV)
    key = work.first + row
    first_row = sequence.first_k + work.first
    channel, channel_v = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_DIM_V)

    # Keys that no query of the sequence sees may hold anything, NaN too: they are zeros.
    seen = keys_of_tile(sequence, mask, 0, shape.seqlen_q)
    is_seen = (key >= seen.begin) & (key < seen.end)
    k_address = row_address(k, sequence.batch, kv_head, first_row)
    v_address = row_address(v, sequence.batch, kv_head, first_row)
    keys = Keys(
        load_tile(k_address, k.stride_row, row, is_seen, channel, HEAD_DIM),
        load_tile(v_address, v.stride_row, row, is_seen, channel_v, HEAD_DIM_V),
        queries_of(sequence, mask, key),
        queries_of_tile(sequence, mask, work.first, BLOCK_KV),
    )
    source = QuerySource(q, q_tma, grad_out, grad_out_tma, terms, terms_tma, scale, shape, sequence)
    blocks = q_blocks(sequence, mask, work.first, BLOCK_Q, BLOCK_KV)
    acc_dk = tl.zeros((BLOCK_KV, BLOCK_DIM), tl.float32)
    acc_dv = tl.zeros((BLOCK_KV, BLOCK_DIM_V), tl.float32)
    # Masked blocks first: the registers of their ranges are then free for the others.
    for full in tl.static_range(2):
        acc_dk, acc_dv = pass_queries(
            acc_dk,
            acc_dv,
            keys,
            source,
            kv_head,
            blocks,
            full == 0,
            HAS_BLIND_QUERIES,
            HAS_SOFTCAP,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_Q,
            PRECISION,
        )

    is_key = key < sequence.seqlen_kv
    grad_v_address = row_address(grad_v, sequence.batch, kv_head, first_row)
    store_tile(grad_v_address, grad_v.stride_row, row, is_key, channel_v, acc_dv, HEAD_DIM_V)
    acc_dk *= scale.value if scale.rows is None else HEAD_DIM**-0.5
    position = key_positions(rotary, sequence, key, is_key)
    acc_dk = restore(acc_dk, position, rotary, kv_head, ROTARY_DIM, INTERLEAVED, BLOCK_DIM)
    grad_k_address = row_address(grad_k, sequence.batch, kv_head, first_row)
    store_tile(grad_k_address, grad_k.stride_row, row, is_key, channel, acc_dk, HEAD_DIM)
