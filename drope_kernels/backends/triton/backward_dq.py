"""Attention backward: dq, and the gradient of the scale of each query.

A program owns BLOCK_Q queries of one head and passes over the keys that they see, computing scores
and dP once more, so that every sum is formed by one program in one order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from drope_kernels.backends.triton.block_range import (
    IndexRange,
    count_blocks,
    keys_of,
    keys_of_tile,
    kv_blocks,
    nth_block,
)
from drope_kernels.backends.triton.delta import QueryTerms
from drope_kernels.backends.triton.grad_rows import restore
from drope_kernels.backends.triton.rotary import query_positions
from drope_kernels.backends.triton.rows import (
    HeadRows,
    load_block,
    load_tile,
    row_address,
    store_tile,
)
from drope_kernels.backends.triton.schedule import scheduled_tile
from drope_kernels.backends.triton.sequence import query_index, work_tile
from drope_kernels.backends.triton.softmax_backward import as_column, load_terms, probabilities
from drope_kernels.backends.triton.unspecialized import plain_mask, plain_schedule, plain_shape


class Queries(NamedTuple):
    """A tile of queries, and whom they see."""

    q: tl.tensor  # (BLOCK_Q, BLOCK_DIM), rotated
    grad_o: tl.tensor  # (BLOCK_Q, BLOCK_DIM_V)
    terms: QueryTerms  # (BLOCK_Q, 1)
    keys: IndexRange  # that each query sees
    tile_keys: IndexRange  # that any of them sees


@triton.jit
def pass_keys(
    acc_dq,
    row_grad_scale,
    queries,
    k_rows,
    v_rows,
    softcap,
    blocks,
    MASKED: tl.constexpr,
    HAS_UNSEEN_KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEED_GRAD_SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Passes over the kv blocks that need a mask, or over those that need none."""
    for n in tl.range(0, count_blocks(blocks, MASKED)):
        kv_block = nth_block(blocks, n, MASKED)
        first = kv_block * BLOCK_KV
        is_key = None
        # Keys that nobody sees may hold NaN, which a dS of 0 would not keep out.
        if MASKED and (k_rows.tma is None or HAS_UNSEEN_KEYS):
            key = first + tl.arange(0, BLOCK_KV)
            is_key = (key >= queries.tile_keys.begin) & (key < queries.tile_keys.end)
        k = load_block(k_rows, kv_block, is_key, HEAD_DIM, BLOCK_KV, BLOCK_DIM)
        acc_s = tl.dot(queries.q, tl.trans(k), input_precision=PRECISION)
        p, slope = probabilities(
            acc_s, queries.terms, softcap, queries.keys, first, MASKED, HAS_SOFTCAP
        )
        v = load_block(v_rows, kv_block, is_key, HEAD_DIM_V, BLOCK_KV, BLOCK_DIM_V)
        acc_dp = tl.dot(queries.grad_o, tl.trans(v), input_precision=PRECISION)
        grad_s = p * (acc_dp + queries.terms.minus_delta) * slope
        if NEED_GRAD_SCALE:
            row_grad_scale += tl.sum(grad_s * acc_s, 1)
        acc_dq = tl.dot(grad_s.to(k.dtype), k, acc_dq, input_precision=PRECISION)
    return acc_dq, row_grad_scale


@triton.jit
def backward_dq_kernel(
    q,  # (batch, num_heads_q, seqlen_q, head_dim), rotated
    k,  # (batch, num_heads_kv, seqlen_kv, head_dim), rotated
    v,  # (batch, num_heads_kv, seqlen_kv, head_dim_v)
    grad_out,  # (batch, num_heads_q, seqlen_q, head_dim_v)
    terms,
    k_tma,  # k and v in blocks of BLOCK_KV keys; None: no TMA
    v_tma,
    grad_q,  # like q
    grad_scale,  # (batch, num_heads_q, seqlen_q) contiguous, float32; None: not needed
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
    HAS_UNSEEN_KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    shape, mask = plain_shape(shape), plain_mask(mask)
    schedule = plain_schedule(schedule)
    head_row, tile = scheduled_tile(schedule, tl.program_id(0))
    program = head_row * schedule.num_tiles + tile
    work = work_tile(
        shape, mask, ranges, program, shape.num_heads_q, schedule.num_tiles, False, BLOCK_Q
    )
    sequence, head = work.sequence, work.head
    kv_head = head // (shape.num_heads_q // shape.num_heads_kv)
    row = tl.arange(0, BLOCK_Q)
    query = work.first + row
    is_query = query < sequence.seqlen_q
    first_row = sequence.first_q + work.first
    channel, channel_v = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_DIM_V)

    # Queries that see no key may hold anything, NaN too: they are zeros.
    keys = keys_of(sequence, mask, query)
    sees = is_query & (keys.begin < keys.end)
    q_address = row_address(q, sequence.batch, head, first_row)
    grad_o_address = row_address(grad_out, sequence.batch, head, first_row)
    # A tile behind its sequence has no terms, nor room for them.
    first = tl.minimum(work.first, sequence.seqlen_q)
    query_terms = load_terms(terms, None, scale, shape, sequence, head, first, is_query, BLOCK_Q)
    queries = Queries(
        load_tile(q_address, q.stride_row, row, sees, channel, HEAD_DIM),
        load_tile(grad_o_address, grad_out.stride_row, row, sees, channel_v, HEAD_DIM_V),
        as_column(query_terms),
        keys,
        keys_of_tile(sequence, mask, work.first, BLOCK_Q),
    )
    k_address = row_address(k, sequence.batch, kv_head, sequence.first_k)
    v_address = row_address(v, sequence.batch, kv_head, sequence.first_k)
    k_rows = HeadRows(k_address, k.stride_row, k_tma, sequence.batch, kv_head, sequence.first_k)
    v_rows = HeadRows(v_address, v.stride_row, v_tma, sequence.batch, kv_head, sequence.first_k)
    blocks = kv_blocks(sequence, mask, work.first, BLOCK_Q, BLOCK_KV)
    acc_dq = tl.zeros((BLOCK_Q, BLOCK_DIM), tl.float32)
    row_grad_scale = tl.zeros((BLOCK_Q,), tl.float32)
    for masked in tl.static_range(2):
        acc_dq, row_grad_scale = pass_keys(
            acc_dq,
            row_grad_scale,
            queries,
            k_rows,
            v_rows,
            scale.softcap,
            blocks,
            masked == 1,
            HAS_UNSEEN_KEYS,
            HAS_SOFTCAP,
            grad_scale is not None,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_DIM,
            BLOCK_DIM_V,
            BLOCK_KV,
            PRECISION,
        )

    acc_dq *= query_terms.scale[:, None]
    position = query_positions(rotary, sequence, query, is_query)
    acc_dq = restore(acc_dq, position, rotary, kv_head, ROTARY_DIM, INTERLEAVED, BLOCK_DIM)
    grad_q_address = row_address(grad_q, sequence.batch, head, first_row)
    store_tile(grad_q_address, grad_q.stride_row, row, is_query, channel, acc_dq, HEAD_DIM)
    if grad_scale is not None:
        index = query_index(shape, sequence, head, query)
        tl.store(grad_scale + index, row_grad_scale, mask=is_query)
