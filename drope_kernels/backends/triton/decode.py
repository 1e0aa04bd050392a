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
from drope_kernels.backends.triton.softmax import (
    LOG2_E,
    cap_scores,
    finish,
    new_softmax,
    query_scale,
    update,
)
from drope_kernels.backends.triton.unspecialized import plain_mask, plain_shape


@triton.jit(do_not_specialize=("num_tiles", "num_splits"))
def decode_kernel(
    q,  # (batch, num_heads_q, seqlen_q, head_dim)
    cache,
    out,  # (num_splits * batch, num_heads_q, seqlen_q, head_dim_v)
    lse,  # (num_splits * batch, num_heads_q, seqlen_q) contiguous, float32
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

    natural_scale = query_scale(scale, sequence, rows.head, rows.query, rows.is_row)
    scale_log2 = natural_scale * LOG2_E
    if HAS_SOFTCAP:
        scale_log2 = tl.full((BLOCK_Q,), LOG2_E, tl.float32)
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
            acc_s = cap_scores(acc_s, natural_scale, scale.softcap)
        if PAGE_SIZE > 0:  # who sees a key that is lost has no result
            is_lost = is_key & (places.is_there == 0)
            acc_s = tl.where(is_lost[None, :], float("nan"), acc_s)
        acc_s = mask_scores(acc_s, keys, kv_block * BLOCK_KV, BLOCK_KV)
        p, row_scale, softmax = update(softmax, acc_s, scale_log2)
        acc_o = acc_o * row_scale[:, None]
        v_address, v_row = head_address(cache.v, kv_head), row_offsets(cache.v, places)
        v = load_tile(v_address, 1, v_row, places.is_there, channel_v, HEAD_DIM_V)
        acc_o = tl.dot(p.to(v.dtype), v, acc_o, input_precision=PRECISION)

    inverse, row_lse = finish(softmax)
    inverse = tl.where(work.fits, inverse, float("nan"))
    row_lse = tl.where(work.fits, row_lse, float("nan"))
    batch = work.split * shape.batch + sequence.batch
    # A part without keys is its lse alone.
    is_written = rows.is_row & (tl.where(row_lse > float("-inf"), 1, num_splits) == 1)
    out_row = group_offsets(out, batch, rows)
    store_tile(out.ptr, 1, out_row, is_written, channel_v, acc_o * inverse[:, None], HEAD_DIM_V)
    lse_row = tl.cast(batch * shape.num_heads_q + rows.head, tl.int64) * shape.seqlen_q
    tl.store(lse + lse_row + rows.query, row_lse, mask=rows.is_row)
