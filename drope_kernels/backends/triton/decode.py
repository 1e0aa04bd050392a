"""Decoding: each program attends with a tile of rows of one kv head to one part of their keys
(FlashAttention-2, arXiv 2307.08691, algorithm 1, over split keys).
"""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.block_range import keys_of, keys_of_tile
from drope_kernels.backends.triton.decode_work import decode_work, group_offsets, kv_blocks_of
from drope_kernels.backends.triton.kv_cache import (
    head_address,
    places_of_block,
    row_offsets,
)
from drope_kernels.backends.triton.mask import mask_scores
from drope_kernels.backends.triton.pairs import (
    angles_at,
    load_parts,
    load_turns,
    multiply_parts,
    rotate_pairs,
    sum_of_angles,
)
from drope_kernels.backends.triton.rotary import query_positions
from drope_kernels.backends.triton.rows import load_tile, store_tile
from drope_kernels.backends.triton.sequence import num_queries
from drope_kernels.backends.triton.softmax import (
    LOG2_E,
    cap_scores,
    finish,
    new_softmax,
    query_scale,
    score_scale,
    update,
)
from drope_kernels.backends.triton.unspecialized import plain_mask, plain_shape


@triton.jit(do_not_specialize=("num_tiles", "num_splits"))
def decode_kernel(
    q,  # (batch, num_heads_q, seqlen_q, head_dim)
    cache,
    out,  # (num_splits * batch, num_heads_q, seqlen_q, head_dim_v)
    lse,  # (batch, num_heads_q, seqlen_q) contiguous, float32; not written where there are parts
    part_state,  # (2, num_splits, batch, num_heads_q, seqlen_q) likewise; None: one part
    num_keys,  # (batch,) int32: keys of each row; outside 0 .. capacity: it has no results
    shape,  # seqlen_kv is the capacity
    mask,
    ranges,
    scale,
    rotary,
    num_tiles,
    num_splits,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTATES_KEYS: tl.constexpr,  # the cache is raw
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_STILL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    shape, mask = plain_shape(shape), plain_mask(mask)
    work = decode_work(shape, ranges, num_keys, num_tiles, num_splits, BLOCK_Q)
    sequence, rows, kv_head = work.sequence, work.rows, work.kv_head
    position = query_positions(rotary, sequence, rows.query, rows.is_row)
    q_row = group_offsets(q, sequence.batch, rows)
    q_parts = load_parts(
        q.ptr, q_row, rows.is_row, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_PAIRS, BLOCK_STILL
    )
    if ROTARY_DIM > 0:
        turns = load_turns(rotary, kv_head, ROTARY_DIM, BLOCK_PAIRS)
        q_parts = rotate_pairs(q_parts, angles_at(position, turns, rotary.attention_factor))
        row_angles = angles_at(tl.arange(0, BLOCK_KV).to(tl.float32), turns, 1.0)

    logit_scale = query_scale(scale, sequence.batch, rows.head, rows.query, rows.is_row)
    natural_scale = score_scale(logit_scale, scale.softcap, HAS_SOFTCAP)
    keys = keys_of(sequence, mask, rows.query)
    tile_keys = keys_of_tile(sequence, mask, rows.first_query, BLOCK_Q)
    kv_blocks = kv_blocks_of(tile_keys, work.split, num_splits, BLOCK_KV)
    channel_v = tl.arange(0, BLOCK_DIM_V)

    acc_o = tl.zeros((BLOCK_Q, BLOCK_DIM_V), tl.float32)
    softmax = new_softmax(BLOCK_Q)
    for kv_block in tl.range(kv_blocks.begin, kv_blocks.end):
        key = kv_block * BLOCK_KV + tl.arange(0, BLOCK_KV)
        # Keys that no query of the tile sees may hold anything, NaN too: they are zeros to it.
        is_key = (key >= tile_keys.begin) & (key < tile_keys.end)
        places = places_of_block(cache, sequence.batch, kv_block, key, is_key, PAGE_SIZE, BLOCK_KV)
        k = load_parts(
            head_address(cache.k, kv_head),
            row_offsets(cache.k, places),
            places.is_there,
            HEAD_DIM,
            ROTARY_DIM,
            INTERLEAVED,
            BLOCK_PAIRS,
            BLOCK_STILL,
        )
        if ROTATES_KEYS:
            first_key = tl.full((1,), kv_block * BLOCK_KV, tl.int32).to(tl.float32)
            block_angles = angles_at(first_key, turns, rotary.attention_factor)
            k = rotate_pairs(k, sum_of_angles(row_angles, block_angles))
        acc_s = multiply_parts(q_parts, k, BLOCK_PAIRS, BLOCK_STILL, PRECISION)
        if HAS_SOFTCAP:
            acc_s = cap_scores(acc_s, logit_scale[:, None], scale.softcap)
        if PAGE_SIZE > 0:  # who sees a key that is lost has no result
            is_lost = is_key & (places.is_there == 0)
            acc_s = tl.where(is_lost[None, :], float("nan"), acc_s)
        acc_s = mask_scores(acc_s, keys, kv_block * BLOCK_KV, BLOCK_KV)
        p, row_scale, softmax = update(softmax, acc_s, natural_scale * LOG2_E)
        acc_o = acc_o * row_scale[:, None]
        v_address, v_row = head_address(cache.v, kv_head), row_offsets(cache.v, places)
        v = load_tile(v_address, 1, v_row, places.is_there, channel_v, HEAD_DIM_V)
        acc_o = tl.dot(p.to(v.dtype), v, acc_o, input_precision=PRECISION)

    state = finish(softmax, natural_scale)
    inverse = tl.where(work.fits, state.inverse, float("nan"))
    batch = work.split * shape.batch + sequence.batch
    index = tl.cast(batch * shape.num_heads_q + rows.head, tl.int64) * shape.seqlen_q + rows.query
    is_written = rows.is_row
    if part_state is not None:
        row_sum = tl.where(work.fits, softmax.row_sum, float("nan"))
        is_written = rows.is_row & (row_sum != 0.0)  # a part without keys is its sum alone
        tl.store(part_state + index, state.row_max, mask=rows.is_row)
        tl.store(part_state + num_splits * num_queries(shape) + index, row_sum, mask=rows.is_row)
    else:
        tl.store(lse + index, tl.where(work.fits, state.lse, float("nan")), mask=rows.is_row)
    out_row = group_offsets(out, batch, rows)
    store_tile(out.ptr, 1, out_row, is_written, channel_v, acc_o * inverse[:, None], HEAD_DIM_V)
