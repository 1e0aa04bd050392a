"""k' = R(position) k: the keys of a call rotated once, rounded once to the input dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.rotary import key_positions, partner_of, rotate
from drope_kernels.backends.triton.rows import load_tile, row_address, store_tile
from drope_kernels.backends.triton.sequence import work_tile


@triton.jit
def load_rotated(
    address,
    stride_row,
    row,
    is_row,
    position,
    rotary,
    kv_head,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows rotated on the way from memory, in the dtype that they have there."""
    channel = tl.arange(0, BLOCK_DIM)
    x = load_tile(address, stride_row, row, is_row, channel, DIM)
    if ROTARY_DIM > 0:
        other = partner_of(channel, ROTARY_DIM, INTERLEAVED)
        partner = load_tile(address, stride_row, row, is_row, other, DIM)
        x = rotate(
            x.to(tl.float32),
            partner.to(tl.float32),
            position,
            rotary,
            kv_head,
            1.0,
            ROTARY_DIM,
            INTERLEAVED,
            BLOCK_DIM,
        )
    return x.to(address.dtype.element_ty)


@triton.jit(do_not_specialize=("shape", "mask", "num_tiles"))
def prepare_kernel(
    k,
    k_prepared,
    shape,
    mask,
    rotary,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Rows outside every sequence of a packed call stay as they are."""
    program = tl.program_id(0)
    work = work_tile(shape, mask, program, shape.num_heads_kv, num_tiles, True, BLOCK_KV)
    sequence, kv_head = work.sequence, work.head
    row = tl.arange(0, BLOCK_KV)
    key = work.first + row
    is_key = key < sequence.seqlen_kv
    first_row = sequence.first_k + work.first
    source = row_address(k, sequence.batch, kv_head, first_row)
    x = load_rotated(
        source,
        k.stride_row,
        row,
        is_key,
        key_positions(rotary, sequence, key, is_key),
        rotary,
        kv_head,
        HEAD_DIM,
        BLOCK_DIM,
        ROTARY_DIM,
        INTERLEAVED,
    )
    target = row_address(k_prepared, sequence.batch, kv_head, first_row)
    channel = tl.arange(0, BLOCK_DIM)
    store_tile(target, k_prepared.stride_row, row, is_key, channel, x, HEAD_DIM)
