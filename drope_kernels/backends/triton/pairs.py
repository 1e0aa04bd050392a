"""Tiles of rows that rotate on their way into a product: the first channels of all pairs in one
tile, the second in another, so that no channel has to look for its partner.

Angles of a block of keys are its first key's plus a row's within the block (sin(a + b) = sin a cos
b + cos a sin b): the polynomials of sincos_turns for every key would take longer than its bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from drope_kernels.backends.triton.rotary import sincos_turns
from drope_kernels.backends.triton.rows import load_tile, store_tile


class Turns(NamedTuple):
    hi: tl.tensor  # (BLOCK_PAIRS,) turns per position; 0 beyond the pairs that rotate
    lo: tl.tensor


class Angles(NamedTuple):
    sin: tl.tensor  # (rows, BLOCK_PAIRS), of one row or as many as it meets
    cos: tl.tensor


class Parts(NamedTuple):
    """Channels of a tile of rows; a part of no channels repeats another."""

    first: tl.tensor  # (rows, BLOCK_PAIRS) of each pair
    second: tl.tensor
    still: tl.tensor  # (rows, BLOCK_STILL) from ROTARY_DIM on


@triton.jit
def load_turns(rotary, kv_head, ROTARY_DIM: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    pair = tl.arange(0, BLOCK_PAIRS)
    table = tl.where(rotary.num_tables > 1, kv_head * (ROTARY_DIM // 2), 0)
    is_pair = pair < ROTARY_DIM // 2
    hi = tl.load(rotary.turns_hi + table + pair, mask=is_pair, other=0.0)
    return Turns(hi, tl.load(rotary.turns_lo + table + pair, mask=is_pair, other=0.0))


@triton.jit
def angles_at(position, turns, factor):
    """At positions (rows,) float32; `factor` multiplies sin and cos."""
    sin, cos = sincos_turns(position[:, None], turns.hi[None, :], turns.lo[None, :])
    return Angles(sin * factor, cos * factor)


@triton.jit
def sum_of_angles(a, b):
    sin = tl.fma(a.sin, b.cos, a.cos * b.sin)
    return Angles(sin, tl.fma(a.cos, b.cos, -(a.sin * b.sin)))


@triton.jit
def load_parts(
    address,
    row,
    is_row,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_STILL: tl.constexpr,
):
    """Of rows at offsets `row` (rows,); 0 where not is_row."""
    if BLOCK_STILL > 0:
        channel = tl.arange(0, BLOCK_STILL)
        still = load_tile(address + ROTARY_DIM, 1, row, is_row, channel, HEAD_DIM - ROTARY_DIM)
    if BLOCK_PAIRS == 0:
        first, second = still, still
    elif INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK_PAIRS)
        x = load_tile(address, 1, row, is_row, channel, ROTARY_DIM)
        first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK_PAIRS, 2)))
    else:
        pair = tl.arange(0, BLOCK_PAIRS)
        first = load_tile(address, 1, row, is_row, pair, ROTARY_DIM // 2)
        second = load_tile(address + ROTARY_DIM // 2, 1, row, is_row, pair, ROTARY_DIM // 2)
    if BLOCK_STILL == 0:
        still = first
    return Parts(first, second, still)


@triton.jit
def store_parts(
    address,
    row,
    is_row,
    x,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_STILL: tl.constexpr,
):
    """To rows at offsets `row` (rows,), where is_row."""
    if BLOCK_STILL > 0:
        channel = tl.arange(0, BLOCK_STILL)
        still = address + ROTARY_DIM
        store_tile(still, 1, row, is_row, channel, x.still, HEAD_DIM - ROTARY_DIM)
    if BLOCK_PAIRS > 0:
        if INTERLEAVED:
            channel = tl.arange(0, 2 * BLOCK_PAIRS)
            pairs = tl.reshape(tl.join(x.first, x.second), (row.shape[0], 2 * BLOCK_PAIRS))
            store_tile(address, 1, row, is_row, channel, pairs, ROTARY_DIM)
        else:
            pair, half = tl.arange(0, BLOCK_PAIRS), ROTARY_DIM // 2
            store_tile(address, 1, row, is_row, pair, x.first, half)
            store_tile(address + half, 1, row, is_row, pair, x.second, half)


@triton.jit
def rotate_pairs(x, angles):
    """In float32, rounded once to the dtype that they came in."""
    first, second = x.first.to(tl.float32), x.second.to(tl.float32)
    y1 = first * angles.cos - second * angles.sin
    y2 = second * angles.cos + first * angles.sin
    return Parts(y1.to(x.first.dtype), y2.to(x.second.dtype), x.still)


@triton.jit
def multiply_parts(
    q, k, BLOCK_PAIRS: tl.constexpr, BLOCK_STILL: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores q kT (BLOCK_Q, BLOCK_KV) of tiles in the same parts."""
    if BLOCK_PAIRS == 0:
        acc_s = tl.dot(q.still, tl.trans(k.still), input_precision=PRECISION)
    else:
        acc_s = tl.dot(q.first, tl.trans(k.first), input_precision=PRECISION)
        acc_s = tl.dot(q.second, tl.trans(k.second), acc_s, input_precision=PRECISION)
        if BLOCK_STILL > 0:
            acc_s = tl.dot(q.still, tl.trans(k.still), acc_s, input_precision=PRECISION)
    return acc_s
