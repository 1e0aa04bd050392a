"""Hides from each row of a tile of scores the keys that its query does not see."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_scores(acc_s, keys, first_key, BLOCK_KV: tl.constexpr):
    """acc_s (BLOCK_Q, BLOCK_KV): scores of keys first_key + column; keys: what each row sees."""
    key = first_key + tl.arange(0, BLOCK_KV)[None, :]
    visible = (key >= keys.begin[:, None]) & (key < keys.end[:, None])
    return tl.where(visible, acc_s, float("-inf"))
