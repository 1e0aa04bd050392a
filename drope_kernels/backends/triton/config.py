"""Tile sizes: a small table per architecture, chosen by pure functions of a call's shape."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

MAX_SPLITS = 128


def family_of(architecture: int) -> int:
    """90: Hopper and the Blackwells of data centres, with TMA and 227 KiB of shared memory a block.

    80: all others, whose configs stay within the 99 KiB of sm_86, sm_89 and sm_120.
    """
    return 90 if 90 <= architecture < 120 else 80


class ForwardConfig(NamedTuple):
    BLOCK_Q: int
    BLOCK_KV: int
    num_warps: int
    num_stages: int
    BLOCK_ROTATED: int  # queries that rotate at a time: 8 pairs of channels a thread, or fewer


# By padded head_dim. Compiled with Triton 3.6.0 no variant of these spills, which is what bounded
# them; their speed is not measured. sm_90: 128 queries share what comes from L2: with 64, at 600
# TFLOP/s, they would ask it for some 9 TB/s. At head_dim 64 two programs fit an SM, one computing
# exponentials while the other multiplies; the position-free one has 127 registers a thread.
_FORWARD_TMA = {
    64: ForwardConfig(128, 64, 8, 3, 64),
    128: ForwardConfig(128, 128, 8, 2, 32),
    256: ForwardConfig(128, 32, 8, 2, 16),
}
# Addresses of what cp.async copies take registers that TMA does not.
_FORWARD_SM90 = {
    64: ForwardConfig(128, 64, 8, 3, 64),
    128: ForwardConfig(128, 64, 8, 2, 32),
    256: ForwardConfig(64, 32, 8, 2, 16),
}
_FORWARD_SM80 = {
    32: ForwardConfig(128, 64, 8, 2, 128),
    64: ForwardConfig(128, 64, 8, 3, 64),
    128: ForwardConfig(128, 32, 8, 3, 16),
    256: ForwardConfig(64, 32, 8, 2, 16),
}
# Products of float32 keep whole rows of both factors in registers.
_FORWARD_FLOAT32 = {
    64: ForwardConfig(32, 32, 4, 2, 32),
    128: ForwardConfig(32, 16, 8, 2, 32),
    256: ForwardConfig(32, 16, 8, 1, 16),
}
# What does not spill on sm_80 spills a few bytes here, and the other way round.
_FORWARD_FLOAT32_SM90 = _FORWARD_FLOAT32 | {256: ForwardConfig(16, 16, 8, 1, 16)}


def forward_config(
    architecture: int, dtype: torch.dtype, head_dim: int, *, use_tma: bool
) -> ForwardConfig:
    """head_dim: the larger one of q, k and of v; use_tma: k and v come by TMA."""
    is_80, is_float32 = family_of(architecture) == 80, dtype == torch.float32
    if is_80:
        table = _FORWARD_FLOAT32 if is_float32 else _FORWARD_SM80
    elif is_float32:
        table = _FORWARD_FLOAT32_SM90
    else:
        table = _FORWARD_TMA if use_tma else _FORWARD_SM90
    return table[min(columns for columns in table if head_dim <= columns)]


class PrepareConfig(NamedTuple):
    BLOCK_KV: int
    num_warps: int


def prepare_config(head_dim: int) -> PrepareConfig:
    """Small programs, several on an SM: while some wait for memory others compute angles."""
    return PrepareConfig(max(16, _rows_in_registers(4, head_dim)), 4)


def _rows_in_registers(num_warps: int, head_dim: int) -> int:
    """Rows whose rotation takes 16 pairs of channels a thread."""
    block_pairs = max(16, 1 << (head_dim - 1).bit_length() - 1)
    return num_warps * 512 // block_pairs


class BackwardConfig(NamedTuple):
    BLOCK_Q: int
    BLOCK_KV: int
    num_warps: int
    num_stages: int


class DeltaConfig(NamedTuple):
    BLOCK_Q: int
    num_warps: int


# (90 with TMA or 80, block_dim, is_heavy); speed not measured. The largest tiles of which Triton
# 3.6 spills no register: dk and dv, or dq, and scores and dP of a tile are float32 there, 255 a
# thread; a heavy call keeps more. 64 x 128 is FlashAttention-3's tile of head_dim 128: of two
# warpgroups one multiplies while the other is at its exponentials, and with 64 queries shared
# memory is read for 3/4 of the time of the products, with 32 for all of it (estimates). The tiles
# of 80 fit the 99 KiB of sm_86 and sm_89.
_GRAD_KEYS = {
    (80, 64, False): BackwardConfig(64, 128, 8, 2),
    (80, 64, True): BackwardConfig(32, 64, 8, 2),
    (80, 128, False): BackwardConfig(64, 64, 8, 2),
    (80, 128, True): BackwardConfig(32, 64, 8, 2),
    (80, 256, False): BackwardConfig(16, 32, 8, 2),
    (80, 256, True): BackwardConfig(16, 32, 8, 2),
    (90, 64, False): BackwardConfig(64, 128, 8, 2),
    (90, 64, True): BackwardConfig(64, 128, 8, 2),
    (90, 128, False): BackwardConfig(64, 128, 8, 2),
    (90, 128, True): BackwardConfig(32, 128, 8, 2),
    (90, 256, False): BackwardConfig(16, 64, 8, 2),
    (90, 256, True): BackwardConfig(16, 32, 8, 2),
}
_GRAD_QUERIES = {
    (80, 64, False): BackwardConfig(128, 64, 8, 2),
    (80, 64, True): BackwardConfig(64, 32, 4, 2),
    (80, 128, False): BackwardConfig(128, 32, 8, 2),
    (80, 128, True): BackwardConfig(64, 32, 8, 2),
    (80, 256, False): BackwardConfig(32, 32, 8, 2),
    (80, 256, True): BackwardConfig(32, 32, 8, 2),
    (90, 64, False): BackwardConfig(128, 128, 8, 2),
    (90, 64, True): BackwardConfig(128, 64, 8, 2),
    (90, 128, False): BackwardConfig(128, 64, 8, 3),
    (90, 128, True): BackwardConfig(128, 32, 8, 2),
    (90, 256, False): BackwardConfig(64, 64, 8, 2),
    (90, 256, True): BackwardConfig(32, 64, 8, 2),
}
# Products of float32 keep whole rows of both factors in registers: from head_dim 128 on dq, with
# four such rows, spills. Its tiles are forward's, as under the interpreter products of other shapes
# would round scores otherwise than those of lse.
_GRAD_KEYS_FLOAT32 = {
    64: BackwardConfig(32, 32, 8, 1),
    128: BackwardConfig(16, 16, 8, 1),
    256: BackwardConfig(16, 16, 8, 1),
}
_GRAD_QUERIES_FLOAT32 = {
    64: BackwardConfig(32, 32, 8, 1),
    128: BackwardConfig(32, 16, 8, 1),
    256: BackwardConfig(16, 16, 8, 1),
}


def delta_config(block_dim_v: int) -> DeltaConfig:
    """Rows of 8 KiB at most for each of the two tensors that are read."""
    return DeltaConfig(max(16, 4096 // block_dim_v), 4)


def backward_config(
    dtype: torch.dtype, block_dim: int, *, use_tma: bool, is_heavy: bool
) -> BackwardConfig:
    """Of dk and dv.

    Args:
        block_dim: the larger one of q, k and of v, padded to a power of two.
        use_tma: what the loop reads comes by TMA.
        is_heavy: has row scales, softcap or rows to leave out, or no TMA on sm_90.
    """
    column = max(64, block_dim)
    if dtype == torch.float32:
        return _GRAD_KEYS_FLOAT32[column]
    return _GRAD_KEYS[90 if use_tma else 80, column, is_heavy]


def backward_dq_config(
    dtype: torch.dtype, block_dim: int, *, use_tma: bool, is_heavy: bool
) -> BackwardConfig:
    """Of dq; arguments as of `backward_config`."""
    column = max(64, block_dim)
    if dtype == torch.float32:
        return _GRAD_QUERIES_FLOAT32[column]
    return _GRAD_QUERIES[90 if use_tma else 80, column, is_heavy]


class DecodeConfig(NamedTuple):
    BLOCK_Q: int
    BLOCK_KV: int
    num_warps: int
    num_stages: int

    @property
    def programs_per_sm(self) -> int:
        """Of 4 warps at the most registers a thread can have; two have 64 KiB in flight."""
        return 8 // self.num_warps


# Of up to 16, up to 32 and more rows (queries of the heads that share a kv head), by bytes of a
# channel and padded channels. Decoding reads each key and value once and computes little, so that
# all depends on bytes in flight: a device of 3.35 TB/s, 132 SMs and some 800 ns from request to
# data needs 20 KiB of them per SM (csrc/cuda/attention/decode/decode_sm80_config.h). Three stages
# hold two blocks of keys and values in shared memory, 32 KiB each for 16 rows, one in flight while
# the other is multiplied: 72 KiB, two programs on an SM of an A100. A warp issues some 420
# instructions for 64 keys of 128 channels, where the bandwidth leaves it 2260 cycles. Estimates
# from the code of Triton 3.6.0: speed is not measured. More rows share what is read; 64 keep the
# registers of acc_o and p below 255. float32 is multiplied by FFMA and has nothing to fill with
# more rows.
_DECODE = {
    (2, 64): ((16, 128, 4, 3), (32, 64, 4, 3), (64, 64, 4, 3)),
    (2, 128): ((16, 64, 4, 3), (32, 32, 4, 3), (64, 64, 8, 3)),
    (2, 256): ((16, 32, 4, 3), (32, 32, 4, 3), (64, 32, 8, 3)),
    (4, 64): ((16, 32, 4, 3),) * 3,
    (4, 128): ((16, 16, 4, 3),) * 3,
    (4, 256): ((16, 16, 8, 3),) * 3,
}
# Where keys rotate as they are read, sin and cos of a block's rows stay in registers: half the
# keys. Some 1170 instructions for 64 keys of 128 channels.
_DECODE_ROTATING = {
    (2, 64): ((16, 64, 4, 3), (32, 32, 4, 3), (64, 32, 4, 3)),
    (2, 128): ((16, 32, 4, 3), (32, 32, 4, 3), (64, 32, 8, 3)),
    (2, 256): ((16, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
    (4, 64): ((16, 32, 4, 3),) * 3,
    (4, 128): ((16, 16, 4, 3),) * 3,
    (4, 256): ((16, 16, 8, 2),) * 3,
}


def decode_config(
    dtype: torch.dtype, block_dim: int, group_rows: int, *, rotates_keys: bool
) -> DecodeConfig:
    """The same for every architecture.

    Args:
        block_dim: the larger one of q, k and of v, padded to a power of two.
        group_rows: queries of all heads that share a kv head.
        rotates_keys: as they are read from a raw cache.
    """
    table = _DECODE_ROTATING if rotates_keys else _DECODE
    few, some, many = table[dtype.itemsize, max(block_dim, 64)]
    return DecodeConfig(*(few if group_rows <= 16 else some if group_rows <= 32 else many))


# Queries from which a decode call is an ordinary forward: two of its tallest tiles for each head.
# Fewer would leave most of a tile, or without splits of the keys most SMs, without work.
LONG_APPEND = 256


@cache
def num_decode_splits(num_tiles: int, num_kv_blocks: int, num_slots: int) -> int:
    """How many programs share the keys of one tile of queries: csrc/cuda/heuristics.h's choice.

    The number with the least estimated time, waves * (key blocks per split + fixed cost) + merging,
    in units of one block of keys; the smallest of equals.

    Args:
        num_tiles: of queries, over all batch rows and kv heads.
        num_kv_blocks: that a tile sees at most.
        num_slots: programs that the device runs at once.
    """
    fixed_blocks = 2.0  # loading q, the first copies, the epilogue
    merge_blocks = 0.05  # reading one more partial result
    merge_launch = 1.0  # the merging kernel, once

    def cost(splits: int) -> float:
        waves = -(-num_tiles * splits // num_slots)
        attending = waves * (-(-num_kv_blocks // splits) + fixed_blocks)
        return attending + (merge_launch + merge_blocks * splits if splits > 1 else 0.0)

    return min(range(1, max(1, min(num_kv_blocks, MAX_SPLITS)) + 1), key=cost)
