"""The keys in use of a pool of pages, dealt back to the rows of the batch."""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.kv_cache import (
    head_address,
    held_keys,
    places_of_block,
    row_offsets,
)
from drope_kernels.backends.triton.rows import load_tile, row_address, store_tile


@triton.jit
def gather_rows(
    source,
    target,
    batch,
    kv_head,
    first_key,
    places,
    is_key,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Rows of keys or values; NaN where the page does not exist, so that who sees them has NaN."""
    channel = tl.arange(0, BLOCK_DIM)
    rows = row_offsets(source, places)
    x = load_tile(head_address(source, kv_head), 1, rows, places.is_there, channel, DIM)
    x = tl.where(places.is_there[:, None], x.to(tl.float32), float("nan"))
    address = row_address(target, batch, kv_head, first_key)
    row = tl.arange(0, x.shape[0])
    store_tile(address, target.stride_row, row, is_key, channel, x, DIM)


@triton.jit(do_not_specialize=("capacity", "num_heads_kv", "num_tiles"))
def gather_kernel(
    cache,
    k,  # (batch, num_heads_kv, capacity, head_dim)
    v,  # (batch, num_heads_kv, capacity, head_dim_v)
    num_keys,  # (batch,) int32: keys of each row
    capacity,
    num_heads_kv,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Rows behind the keys of a row stay unwritten."""
    program = tl.program_id(0)
    tile = program % num_tiles
    kv_head = program // num_tiles % num_heads_kv
    batch = program // num_tiles // num_heads_kv
    first_key = tile * BLOCK_KV
    key = first_key + tl.arange(0, BLOCK_KV)
    is_key = key < held_keys(num_keys, batch, capacity).end
    if tl.max(is_key.to(tl.int32), 0) > 0:
        places = places_of_block(cache, batch, tile, key, is_key, PAGE_SIZE, BLOCK_KV)
        gather_rows(cache.k, k, batch, kv_head, first_key, places, is_key, HEAD_DIM, BLOCK_DIM)
        gather_rows(cache.v, v, batch, kv_head, first_key, places, is_key, HEAD_DIM_V, BLOCK_DIM_V)
