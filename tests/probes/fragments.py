"""Which matrix element each register holds: the PTX ISA's fragment figures as index arrays.

Every function returns arrays of coordinates, one entry a register slot; (32 or 128) threads first,
then registers, then the halves of a register (low half first) where elements are 16 bits wide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


def mma_a_map() -> tuple[Index, Index]:
    """(row, k) of A's slots, (32, 4, 2) each. "Matrix Fragments for mma.m16n8k16"."""
    lane, register, half = np.ogrid[:32, :4, :2]
    row = lane // 4 + 8 * (register % 2) + 0 * half
    k = 2 * (lane % 4) + half + 8 * (register // 2)
    return row, k


def mma_b_map() -> tuple[Index, Index]:
    """(k, column) of B's slots, (32, 2, 2) each."""
    lane, register, half = np.ogrid[:32, :2, :2]
    k = 2 * (lane % 4) + half + 8 * register
    column = lane // 4 + 0 * register + 0 * half
    return k, column


def mma_d_map() -> tuple[Index, Index]:
    """(row, column) of the accumulators, (32, 4) each."""
    lane, register = np.ogrid[:32, :4]
    row = lane // 4 + 8 * (register // 2)
    column = 2 * (lane % 4) + register % 2
    return row, column


def ldmatrix_map(trans: bool) -> tuple[Index, Index]:
    """(row, column) inside one 8x8 matrix of its register's halves, (32, 2) each. "ldmatrix"."""
    lane, half = np.ogrid[:32, :2]
    along_lane = lane // 4 + 0 * half
    along_pair = 2 * (lane % 4) + half
    return (along_pair, along_lane) if trans else (along_lane, along_pair)


def wgmma_a_map() -> tuple[Index, Index]:
    """(row, k) of A in registers, (128, 4, 2) each: mma's A on rows 16w.. of warp w."""
    row, k = mma_a_map()
    warp_row = 16 * np.arange(4)[:, None, None, None]
    return (row[None] + warp_row).reshape(128, 4, 2), np.tile(k, (4, 1, 1))


def wgmma_d_map(n: int) -> tuple[Index, Index]:
    """(row, column) of the accumulators of m64nNk16, (128, n/2) each. "Register Fragments"."""
    thread, register = np.ogrid[:128, : n // 2]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register // 2 % 2)
    column = 8 * (register // 4) + 2 * (thread % 4) + register % 2
    return row, column


def to_matrix(accumulators: NDArray[np.float32]) -> NDArray[np.float32]:
    """(128, n/2) accumulators as the threads hold them -> (64, n)."""
    n = 2 * accumulators.shape[1]
    matrix = np.full((64, n), np.nan, dtype=np.float32)
    matrix[wgmma_d_map(n)] = accumulators
    return matrix
