"""x' = R(position) x: rows rotated from memory to memory, rounded once to their dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.pairs import (
    angles_at,
    load_parts,
    load_turns,
    rotate_pairs,
    store_parts,
)
from drope_kernels.backends.triton.rotary import key_positions
from drope_kernels.backends.triton.rows import row_address
from drope_kernels.backends.triton.sequence import work_tile
from drope_kernels.backends.triton.unspecialized import plain_mask, plain_shape


@triton.jit
def rotate_rows(
    source,
    stride_source,
    target,
    stride_target,
    row,
    is_row,
    position,
    rotary,
    kv_head,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_STILL: tl.constexpr,
):
    """Rows `row` (BLOCK_ROWS,) behind `source`, at `position` (BLOCK_ROWS,), to `target`."""
    x = load_parts(
        source,
        row * stride_source,
        is_row,
        DIM,
        ROTARY_DIM,
        INTERLEAVED,
        BLOCK_PAIRS,
        BLOCK_STILL,
    )
    turns = load_turns(rotary, kv_head, ROTARY_DIM, BLOCK_PAIRS)
    y = rotate_pairs(x, angles_at(position, turns, rotary.attention_factor))
    store_parts(
        target,
        row * stride_target,
        is_row,
        y,
        DIM,
        ROTARY_DIM,
        INTERLEAVED,
        BLOCK_PAIRS,
        BLOCK_STILL,
    )


@triton.jit(do_not_specialize=("num_tiles",))
def prepare_kernel(
    k,  # (batch, num_heads_kv, seqlen_kv, head_dim)
    k_prepared,  # likewise
    shape,
    mask,
    ranges,
    rotary,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_STILL: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """The keys of a call, once for all queries; rows outside every sequence stay as they are."""
    shape, mask = plain_shape(shape), plain_mask(mask)
    program = tl.program_id(0)
    work = work_tile(shape, mask, ranges, program, shape.num_heads_kv, num_tiles, True, BLOCK_KV)
    sequence, kv_head = work.sequence, work.head
    row = tl.arange(0, BLOCK_KV)
    key = work.first + row
    is_key = key < sequence.seqlen_kv
    first_row = sequence.first_k + work.first
    rotate_rows(
        row_address(k, sequence.batch, kv_head, first_row),
        k.stride_row,
        row_address(k_prepared, sequence.batch, kv_head, first_row),
        k_prepared.stride_row,
        row,
        is_key,
        key_positions(rotary, sequence, key, is_key),
        rotary,
        kv_head,
        HEAD_DIM,
        ROTARY_DIM,
        INTERLEAVED,
        BLOCK_PAIRS,
        BLOCK_STILL,
    )
