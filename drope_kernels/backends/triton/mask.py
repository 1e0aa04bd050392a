"""Hides from each row of a tile of scores the keys that its query does not see."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_visible(keys, first_key, BLOCK_KV: tl.constexpr):
    """(BLOCK_Q, BLOCK_KV) of keys first_key + column; keys: what each row sees."""
    key = first_key + tl.arange(0, BLOCK_KV)[None, :]
    return (key >= keys.begin[:, None]) & (key < keys.end[:, None])


@triton.jit
def mask_scores(acc_s, keys, first_key, BLOCK_KV: tl.constexpr):
    """acc_s (BLOCK_Q, BLOCK_KV): scores of keys first_key + column."""
    return tl.where(is_visible(keys, first_key, BLOCK_KV), acc_s, float("-inf"))
