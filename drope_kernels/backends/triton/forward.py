"""Fused attention, forward: each program attends with one tile of queries to all keys they see."""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.block_range import keys_of, keys_of_tile, kv_blocks
from drope_kernels.backends.triton.mask import mask_scores
from drope_kernels.backends.triton.prepare import load_rotated
from drope_kernels.backends.triton.rotary import query_positions
from drope_kernels.backends.triton.rows import load_tile, row_address, store_tile
from drope_kernels.backends.triton.sequence import work_tile
from drope_kernels.backends.triton.softmax import (
    LOG2_E,
    cap_scores,
    finish,
    new_softmax,
    query_scale,
    update,
)


@triton.jit
def attend(
    acc_o,
    softmax,
    q,
    k_address,
    k_stride_row,
    v_address,
    v_stride_row,
    first_block,
    end_block,
    keys,
    tile_keys,
    scale_log2,
    scale,
    softcap,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attends to kv blocks first_block up to end_block."""
    row = tl.arange(0, BLOCK_KV)
    channel, channel_v = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_DIM_V)
    for kv_block in tl.range(first_block, end_block):
        key = kv_block * BLOCK_KV + row
        # Keys that no query of the tile sees may hold anything, NaN too: they are zeros to it.
        is_key = (key >= tile_keys.begin) & (key < tile_keys.end) if MASKED else key >= 0
        k_first = k_address + tl.cast(kv_block * BLOCK_KV, tl.int64) * k_stride_row
        k = load_tile(k_first, k_stride_row, row, is_key, channel, HEAD_DIM)
        acc_s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if HAS_SOFTCAP:
            acc_s = cap_scores(acc_s, scale, softcap)
        if MASKED:
            acc_s = mask_scores(acc_s, keys, kv_block * BLOCK_KV, BLOCK_KV)
        p, row_scale, softmax = update(softmax, acc_s, scale_log2)
        acc_o = acc_o * row_scale[:, None]
        v_first = v_address + tl.cast(kv_block * BLOCK_KV, tl.int64) * v_stride_row
        v = load_tile(v_first, v_stride_row, row, is_key, channel_v, HEAD_DIM_V)
        acc_o = tl.dot(p.to(v.dtype), v, acc_o, input_precision=PRECISION)
    return acc_o, softmax


@triton.jit(do_not_specialize=("shape", "mask", "num_tiles"))
def forward_kernel(
    q,  # (batch, num_heads_q, seqlen_q, head_dim)
    k,  # (batch, num_heads_kv, seqlen_kv, head_dim), rotated
    v,  # (batch, num_heads_kv, seqlen_kv, head_dim_v)
    out,  # (batch, num_heads_q, seqlen_q, head_dim_v)
    lse,  # (batch, num_heads_q, seqlen_q) contiguous, float32
    q_prepared,  # like q, contiguous; None: not saved
    shape,
    mask,
    scale,
    rotary,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    program = tl.program_id(0)
    work = work_tile(shape, mask, program, shape.num_heads_q, num_tiles, False, BLOCK_Q)
    sequence, head = work.sequence, work.head
    kv_head = head // (shape.num_heads_q // shape.num_heads_kv)
    row = tl.arange(0, BLOCK_Q)
    query = work.first + row
    is_query = query < sequence.seqlen_q
    first_row = sequence.first_q + work.first

    q_tile = load_rotated(
        row_address(q, sequence.batch, head, first_row),
        q.stride_row,
        row,
        is_query,
        query_positions(rotary, sequence, query, is_query),
        rotary,
        kv_head,
        HEAD_DIM,
        BLOCK_DIM,
        ROTARY_DIM,
        INTERLEAVED,
    )
    if q_prepared is not None:
        target = row_address(q_prepared, sequence.batch, head, first_row)
        channel = tl.arange(0, BLOCK_DIM)
        store_tile(target, q_prepared.stride_row, row, is_query, channel, q_tile, HEAD_DIM)

    natural_scale = query_scale(scale, sequence, head, query, is_query)
    scale_log2 = natural_scale * LOG2_E
    if HAS_SOFTCAP:
        scale_log2 = tl.full((BLOCK_Q,), LOG2_E, tl.float32)
    keys = keys_of(sequence, mask, query)
    tile_keys = keys_of_tile(sequence, mask, work.first, BLOCK_Q)
    blocks = kv_blocks(sequence, mask, work.first, BLOCK_Q, BLOCK_KV)
    k_address = row_address(k, sequence.batch, kv_head, sequence.first_k)
    v_address = row_address(v, sequence.batch, kv_head, sequence.first_k)

    acc_o = tl.zeros((BLOCK_Q, BLOCK_DIM_V), tl.float32)
    softmax = new_softmax(BLOCK_Q)
    for phase in tl.static_range(3):
        first_block, end_block = blocks.begin, blocks.full_begin
        if phase == 1:
            first_block, end_block = blocks.full_begin, blocks.full_end
        if phase == 2:
            first_block, end_block = blocks.full_end, blocks.end
        acc_o, softmax = attend(
            acc_o,
            softmax,
            q_tile,
            k_address,
            k.stride_row,
            v_address,
            v.stride_row,
            first_block,
            end_block,
            keys,
            tile_keys,
            scale_log2,
            natural_scale,
            scale.softcap,
            phase != 1,
            HAS_SOFTCAP,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_DIM,
            BLOCK_DIM_V,
            BLOCK_KV,
            PRECISION,
        )

    inverse, row_lse = finish(softmax)
    out_address = row_address(out, sequence.batch, head, first_row)
    channel_v = tl.arange(0, BLOCK_DIM_V)
    acc_o = acc_o * inverse[:, None]
    store_tile(out_address, out.stride_row, row, is_query, channel_v, acc_o, HEAD_DIM_V)
    lse_row = tl.cast(sequence.batch * shape.num_heads_q + head, tl.int64) * shape.seqlen_q
    tl.store(lse + lse_row + first_row + row, row_lse, mask=is_query)
