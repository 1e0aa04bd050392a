"""Writes new keys and values to the caches, behind the keys that each row holds."""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.kv_cache import (
    append_fits,
    head_address,
    places_of_keys,
    row_offsets,
)
from drope_kernels.backends.triton.pairs import (
    angles_at,
    load_parts,
    load_turns,
    rotate_pairs,
    store_parts,
)
from drope_kernels.backends.triton.rows import load_tile, row_address, store_tile


@triton.jit(do_not_specialize=("capacity", "num_heads_kv", "num_new", "num_tiles"))
def append_kernel(
    k_new,  # (batch, num_heads_kv, num_new, head_dim), not rotated
    v_new,  # (batch, num_heads_kv, num_new, head_dim_v)
    cache,
    cache_seqlens,  # (batch,) int32: keys of each row before
    num_keys,  # (batch,) int32: keys of each row after; -1 where they do not fit
    rotary,
    capacity,
    num_heads_kv,
    num_new,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    ROTARY_DIM: tl.constexpr,  # 0: keys are stored as they come
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_STILL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Of a row that they do not fit into, nothing is written."""
    program = tl.program_id(0)
    tile = program % num_tiles
    kv_head = program // num_tiles % num_heads_kv
    batch = program // num_tiles // num_heads_kv
    num_cached = tl.load(cache_seqlens + batch)
    fits = append_fits(cache, batch, num_cached, num_new, capacity, PAGE_SIZE)
    is_first = (tile == 0) & (kv_head == 0)
    tl.store(num_keys + batch, tl.where(fits, num_cached + num_new, -1), mask=is_first)

    row = tl.arange(0, BLOCK_KV).to(tl.int64)
    is_new = tile * BLOCK_KV + row < tl.where(fits, num_new, 0)
    key = tl.where(fits, num_cached, 0) + tile * BLOCK_KV + row
    places = places_of_keys(cache, batch, key, is_new, PAGE_SIZE)

    k = load_parts(
        row_address(k_new, batch, kv_head, tile * BLOCK_KV),
        row * k_new.stride_row,
        is_new,
        HEAD_DIM,
        ROTARY_DIM,
        INTERLEAVED,
        BLOCK_PAIRS,
        BLOCK_STILL,
    )
    if ROTARY_DIM > 0:
        turns = load_turns(rotary, kv_head, ROTARY_DIM, BLOCK_PAIRS)
        k = rotate_pairs(k, angles_at(key.to(tl.float32), turns, rotary.attention_factor))
    store_parts(
        head_address(cache.k, kv_head),
        row_offsets(cache.k, places),
        places.is_there,
        k,
        HEAD_DIM,
        ROTARY_DIM,
        INTERLEAVED,
        BLOCK_PAIRS,
        BLOCK_STILL,
    )

    channel_v = tl.arange(0, BLOCK_DIM_V)
    v_address = row_address(v_new, batch, kv_head, tile * BLOCK_KV)
    v = load_tile(v_address, v_new.stride_row, row, is_new, channel_v, HEAD_DIM_V)
    v_rows = row_offsets(cache.v, places)
    store_tile(head_address(cache.v, kv_head), 1, v_rows, places.is_there, channel_v, v, HEAD_DIM_V)
