"""Tile sizes: a small table per architecture, chosen by pure functions of a call's shape."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ForwardConfig(NamedTuple):
    BLOCK_Q: int
    BLOCK_KV: int
    num_warps: int
    num_stages: int
    USE_TMA: bool


def forward_config(architecture: int, dtype: torch.dtype, head_dim: int) -> ForwardConfig:
    """head_dim: the larger one of q, k and of v."""
    return ForwardConfig(64, 32, 4, 2, False)
