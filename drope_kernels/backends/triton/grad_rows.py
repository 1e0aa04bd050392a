"""Gradients of rotated rows on their way out: R^T undoes the rotation in float32, before the one
rounding. The members of a pair are parted within the registers of a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drope_kernels.backends.triton.pairs import load_turns
from drope_kernels.backends.triton.rotary import sincos_turns


@triton.jit
def restore(
    x,
    position,
    rotary,
    kv_head,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """R^T x of an accumulator x (BLOCK_ROWS, BLOCK_DIM) at `position` (BLOCK_ROWS,)."""
    if ROTARY_DIM == 0:
        y = x
    elif not INTERLEAVED and BLOCK_DIM % ROTARY_DIM != 0:
        y = restore_by_gather(x, position, rotary, kv_head, ROTARY_DIM, BLOCK_DIM)
    else:
        first, second = part(x, ROTARY_DIM, INTERLEAVED)
        turns = load_turns(rotary, kv_head, ROTARY_DIM, BLOCK_DIM // 2)
        sin, cos = sincos_turns(position[:, None], turns.hi[None, :], turns.lo[None, :])
        is_pair = tl.arange(0, BLOCK_DIM // 2) < ROTARY_DIM // 2
        factor = tl.where(is_pair, rotary.attention_factor, 1.0)[None, :]
        y1, y2 = first * cos + second * sin, second * cos - first * sin
        y = unite(y1 * factor, y2 * factor, ROTARY_DIM, INTERLEAVED)
    return y


@triton.jit
def restore_by_gather(
    x, position, rotary, kv_head, ROTARY_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """R^T x of half-split pairs that `part` cannot part: each channel looks for its partner."""
    half = ROTARY_DIM // 2
    channel = tl.arange(0, BLOCK_DIM)
    other = tl.where(channel < half, channel + half, channel - half)
    other = tl.where(channel < ROTARY_DIM, other, channel)
    partner = tl.gather(x, tl.broadcast_to(other[None, :], x.shape), 1)
    pair = channel % half + tl.where(rotary.num_tables > 1, kv_head * half, 0)
    hi, lo = tl.load(rotary.turns_hi + pair), tl.load(rotary.turns_lo + pair)
    sin, cos = sincos_turns(position[:, None], hi[None, :], lo[None, :])
    channel = channel[None, :]
    sin = tl.where(channel < half, sin, -sin)
    y = (x * cos + partner * sin) * rotary.attention_factor
    return tl.where(channel < ROTARY_DIM, y, x)


@triton.jit
def part(x, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and second channels of pairs (BLOCK_ROWS, BLOCK_DIM / 2), rotating ones first."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    if INTERLEAVED:
        pairs = tl.reshape(x, (ROWS, PAIRS, 2))
    else:
        halves = tl.reshape(x, (ROWS, 2 * PAIRS // ROTARY_DIM, 2, ROTARY_DIM // 2))
        pairs = tl.permute(halves, (0, 1, 3, 2))
    first, second = tl.split(pairs)
    return tl.reshape(first, (ROWS, PAIRS)), tl.reshape(second, (ROWS, PAIRS))


@triton.jit
def unite(first, second, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Undoes `part`."""
    ROWS: tl.constexpr = first.shape[0]
    PAIRS: tl.constexpr = first.shape[1]
    pairs = tl.join(first, second)
    if not INTERLEAVED:
        halves = tl.reshape(pairs, (ROWS, 2 * PAIRS // ROTARY_DIM, ROTARY_DIM // 2, 2))
        pairs = tl.permute(halves, (0, 1, 3, 2))
    return tl.reshape(pairs, (ROWS, 2 * PAIRS))
