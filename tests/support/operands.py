"""Small operands of `attention` for the tests of torch's machinery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checker import INTERPRETED
from torch import Tensor

import drope_kernels as dk

BACKENDS = (INTERPRETED, *dk.available_backends())
ROPE = dk.Rope(theta=500.0, dim=8)
HEAD_SCALE = torch.tensor([[0.2], [0.3], [0.4], [0.5]])
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def qkv(batch: int = 2, seqlen_q: int = 9, seqlen_kv: int = 11, **options: Any) -> list[Tensor]:
    """Grouped heads, D = 16, Dv = 12, fixed values."""
    generator = torch.Generator().manual_seed(batch + seqlen_q)
    shapes = [(batch, 4, seqlen_q, 16), (batch, 2, seqlen_kv, 16), (batch, 2, seqlen_kv, 12)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(**options).requires_grad_() for x in tensors]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches() -> tuple[list[Tensor], dict[str, Any]]:
    """q and caches of attention_decode, two new tokens per row, and its keyword arguments."""
    q, k, v = (x.detach() for x in qkv(2, 2, 16))
    new = {"k": k[:, :, 14:].clone(), "v": v[:, :, 14:].clone()}
    return [q, k.clone(), v.clone()], {**new, "cache_seqlens": int32(3, 9)}
