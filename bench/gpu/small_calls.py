"""Calls so small that what they cost is the way to the kernel: ours and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import drope_kernels as dk

NAMES = ("forward", "training", "forward with rope", "training with rope", "decode")
SDPA = "sdpa"  # the peer's name: torch's choice among its own kernels
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Sizes:
    batch: int = 1
    num_heads: int = 8
    num_heads_kv: int = 2
    seqlen: int = 128
    head_dim: int = 64


SMALL = Sizes()


def small_calls(backend: str, device: str, sizes: Sizes) -> Calls:
    """Forward, forward + backward, both with rope too, and a decode step, by name."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(num_heads: int, seqlen: int) -> Tensor:
        shape = (sizes.batch, num_heads, seqlen, sizes.head_dim)
        return torch.randn(shape, device=device, dtype=dtype)

    q, grad = (normal(sizes.num_heads, sizes.seqlen) for _ in range(2))
    k, v, k_cache, v_cache = (normal(sizes.num_heads_kv, sizes.seqlen) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def attend(rope: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if backend == SDPA:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return dk.attention(q, k, v, rope=rope, backend=backend)

    def train(rope: bool) -> Any:
        return torch.autograd.grad(attend(rope, *leaves), leaves, grad)

    calls: Calls = {"forward": lambda: attend(False, q, k, v), "training": lambda: train(False)}
    if backend == SDPA:
        return calls
    lengths = torch.full((sizes.batch,), sizes.seqlen // 2, device=device, dtype=torch.int32)
    token, new_k, new_v = (x[:, :, :1].contiguous() for x in (q, k, v))
    calls |= {
        "forward with rope": lambda: attend(True, q, k, v),
        "training with rope": lambda: train(True),
        "decode": lambda: dk.attention_decode(
            *(token, k_cache, v_cache),
            k=new_k,
            v=new_v,
            cache_seqlens=lengths,
            backend=backend,
        ),
    }
    return calls
