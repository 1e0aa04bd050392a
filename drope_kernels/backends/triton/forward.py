"""Fused attention, forward: each program attends with one tile of queries to all keys they see."""

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
from drope_kernels.backends.triton.mask import mask_scores
from drope_kernels.backends.triton.prepare import rotate_rows
from drope_kernels.backends.triton.rotary import query_positions
from drope_kernels.backends.triton.rows import (
    HeadRows,
    load_block,
    load_tile,
    row_address,
    store_tile,
)
from drope_kernels.backends.triton.schedule import scheduled_tile
from drope_kernels.backends.triton.sequence import num_queries, query_index, work_tile
from drope_kernels.backends.triton.softmax import (
    LOG2_E,
    cap_scores,
    finish,
    new_softmax,
    query_scale,
    score_scale,
    update,
)
from drope_kernels.backends.triton.unspecialized import plain_mask, plain_schedule, plain_shape


class Queries(NamedTuple):
    """A tile of queries and what it asks of keys."""

    q: tl.tensor  # (BLOCK_Q, BLOCK_DIM), rotated
    keys: IndexRange  # that each query sees
    tile_keys: IndexRange  # that any of them sees
    scale: tl.tensor  # (BLOCK_Q,)
    scale_log2: tl.tensor  # (BLOCK_Q,) of t, capped or not
    softcap: tl.tensor


@triton.jit
def attend(
    acc_o,
    softmax,
    queries,
    k,
    v,
    blocks,
    MASKED: tl.constexpr,
    HAS_UNSEEN_KEYS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attends to the kv blocks that need a mask, or to those that need none."""
    for n in tl.range(count_blocks(blocks, MASKED)):
        kv_block = nth_block(blocks, n, MASKED)
        is_key, is_value = None, None
        if MASKED:
            key = kv_block * BLOCK_KV + tl.arange(0, BLOCK_KV)
            is_value = (key >= queries.tile_keys.begin) & (key < queries.tile_keys.end)
            if k.tma is None:
                is_key = is_value
            # Keys that nobody sees may hold NaN, which 0 p of theirs would not keep out.
            if v.tma is not None and not HAS_UNSEEN_KEYS:
                is_value = None
        k_tile = load_block(k, kv_block, is_key, HEAD_DIM, BLOCK_KV, BLOCK_DIM)
        acc_s = tl.dot(queries.q, tl.trans(k_tile), input_precision=PRECISION)
        if HAS_SOFTCAP:
            acc_s = cap_scores(acc_s, queries.scale[:, None], queries.softcap)
        if MASKED:
            acc_s = mask_scores(acc_s, queries.keys, kv_block * BLOCK_KV, BLOCK_KV)
        p, row_scale, softmax = update(softmax, acc_s, queries.scale_log2)
        acc_o = acc_o * row_scale[:, None]
        v_tile = load_block(v, kv_block, is_value, HEAD_DIM_V, BLOCK_KV, BLOCK_DIM_V)
        acc_o = tl.dot(p.to(v_tile.dtype), v_tile, acc_o, input_precision=PRECISION)
    return acc_o, softmax


@triton.jit
def forward_kernel(
    q,  # (batch, num_heads_q, seqlen_q, head_dim)
    k,  # (batch, num_heads_kv, seqlen_kv, head_dim), rotated
    v,  # (batch, num_heads_kv, seqlen_kv, head_dim_v)
    k_tma,  # k and v in blocks of (1, 1, BLOCK_KV, BLOCK_DIM or BLOCK_DIM_V); None: no TMA
    v_tma,
    out,  # (batch, num_heads_q, seqlen_q, head_dim_v)
    lse,  # (batch, num_heads_q, seqlen_q) contiguous, float32
    softmax_state,  # (2, batch, num_heads_q, seqlen_q) contiguous, float32; None: not saved
    q_prepared,  # like q, contiguous, to be written; None: position-free
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
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_STILL: tl.constexpr,
    BLOCK_ROTATED: tl.constexpr,  # queries that rotate at a time: as many as registers hold
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

    source = q
    if ROTARY_DIM > 0:
        for first in tl.range(0, BLOCK_Q, BLOCK_ROTATED, num_stages=1):
            some = first + tl.arange(0, BLOCK_ROTATED)
            is_some = work.first + some < sequence.seqlen_q
            rotate_rows(
                row_address(q, sequence.batch, head, first_row),
                q.stride_row,
                row_address(q_prepared, sequence.batch, head, first_row),
                q_prepared.stride_row,
                some,
                is_some,
                query_positions(rotary, sequence, work.first + some, is_some),
                rotary,
                kv_head,
                HEAD_DIM,
                ROTARY_DIM,
                INTERLEAVED,
                BLOCK_PAIRS,
                BLOCK_STILL,
            )
        # Back from memory, where other threads of the program wrote it: products then find q in
        # shared memory as they find a q that does not rotate.
        tl.debug_barrier()
        source = q_prepared
    q_address = row_address(source, sequence.batch, head, first_row)
    channel = tl.arange(0, BLOCK_DIM)
    q_tile = load_tile(q_address, source.stride_row, row, is_query, channel, HEAD_DIM)

    logit_scale = query_scale(scale, sequence.batch, head, sequence.first_q + query, is_query)
    natural_scale = score_scale(logit_scale, scale.softcap, HAS_SOFTCAP)
    keys = keys_of(sequence, mask, query)
    tile_keys = keys_of_tile(sequence, mask, work.first, BLOCK_Q)
    queries = Queries(q_tile, keys, tile_keys, logit_scale, natural_scale * LOG2_E, scale.softcap)
    k_address = row_address(k, sequence.batch, kv_head, sequence.first_k)
    v_address = row_address(v, sequence.batch, kv_head, sequence.first_k)
    head_k = HeadRows(k_address, k.stride_row, k_tma, sequence.batch, kv_head, sequence.first_k)
    head_v = HeadRows(v_address, v.stride_row, v_tma, sequence.batch, kv_head, sequence.first_k)
    blocks = kv_blocks(sequence, mask, work.first, BLOCK_Q, BLOCK_KV)

    acc_o = tl.zeros((BLOCK_Q, BLOCK_DIM_V), tl.float32)
    softmax = new_softmax(BLOCK_Q)
    for masked in tl.static_range(2):
        acc_o, softmax = attend(
            acc_o,
            softmax,
            queries,
            head_k,
            head_v,
            blocks,
            masked == 1,
            HAS_UNSEEN_KEYS,
            HAS_SOFTCAP,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_DIM,
            BLOCK_DIM_V,
            BLOCK_KV,
            PRECISION,
        )

    state = finish(softmax, natural_scale)
    out_address = row_address(out, sequence.batch, head, first_row)
    channel_v = tl.arange(0, BLOCK_DIM_V)
    acc_o = acc_o * state.inverse[:, None]
    store_tile(out_address, out.stride_row, row, is_query, channel_v, acc_o, HEAD_DIM_V)
    index = query_index(shape, sequence, head, query)
    tl.store(lse + index, state.lse, mask=is_query)
    if softmax_state is not None:
        tl.store(softmax_state + index, state.row_max, mask=is_query)
        tl.store(softmax_state + num_queries(shape) + index, state.log2_sum, mask=is_query)
