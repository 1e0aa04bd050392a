"""Rotation of the rows of a tile by their positions, as csrc/position.h defines it.

Angles are turns. ROTARY_DIM 0 is position-free: no angle, no work. INTERLEAVED pairs are channels
(2i, 2i + 1), others (i, i + ROTARY_DIM / 2).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    return tl.floor(x + 0.5)


@triton.jit
def half_turns_sign(half_turns):
    """-1 after an odd number of half turns, which turns both sin and cos around; else 1."""
    parity = tl.fma(nearest(half_turns * 0.5), -2.0, half_turns)
    return tl.fma(tl.abs(parity), -2.0, 1.0)


@triton.jit
def sincos_turns(position, turns_hi, turns_lo):
    """sin and cos of 2 pi position (turns_hi + turns_lo); absolute error below 2e-7."""
    product = position * turns_hi
    rounding = tl.fma(position, turns_hi, -product)  # what `product` lost
    half_turns = nearest(product + product)
    # Both subtractions are exact, so the residual enters at the scale of the reduced angle.
    reduced = tl.fma(half_turns, -0.5, product)
    near = reduced + tl.fma(position, turns_lo, rounding)
    # From 2^20 turns on the residual alone reaches past the quarter turn of the polynomials.
    more_half_turns = nearest(near + near)
    turn = tl.fma(more_half_turns, -0.5, near)  # in [-1/4, 1/4]
    sign = half_turns_sign(half_turns) * half_turns_sign(more_half_turns)

    t2 = turn * turn
    s = tl.fma(t2, 39.538868, -76.5501099)
    s = tl.fma(s, t2, 81.6010208)
    s = tl.fma(s, t2, -41.3416557)
    s = tl.fma(s, t2, 6.28318501)
    c = tl.fma(t2, -25.0223331, 60.1507149)
    c = tl.fma(c, t2, -85.4539719)
    c = tl.fma(c, t2, 64.9393539)
    c = tl.fma(c, t2, -19.7392082)
    return s * turn * sign, tl.fma(c, t2, 1.0) * sign


@triton.jit
def query_positions(rotary, sequence, query, is_query):
    """Where each query of the sequence is, (BLOCK_Q,) float32."""
    if rotary.positions is not None:
        first = tl.cast(sequence.batch, tl.int64) * sequence.seqlen_q
        row = first + sequence.first_q + query
        return tl.load(rotary.positions + row, mask=is_query, other=0.0)
    return (sequence.q_start + query).to(tl.float32)


@triton.jit
def key_positions(rotary, sequence, key, is_key):
    """Where each key of the sequence is, (BLOCK_KV,) float32."""
    if rotary.kv_positions is not None:
        first = tl.cast(sequence.batch, tl.int64) * sequence.seqlen_kv
        row = first + sequence.first_k + key
        return tl.load(rotary.kv_positions + row, mask=is_key, other=0.0)
    return key.to(tl.float32)
