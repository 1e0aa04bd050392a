"""The contenders: our call, and what a user would write instead."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import drope_kernels

from .cases import BenchCase

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@functools.lru_cache
def _cos_sin(seqlen: int, dim: int) -> tuple[Tensor, Tensor]:
    inv_freq = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(seqlen, dtype=torch.float64)[:, None] * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def eager_rope(x: Tensor) -> Tensor:
    """The rotation as transformers writes it, in the input's dtype."""
    cos, sin = (t.to(x.dtype) for t in _cos_sin(x.shape[-2], x.shape[-1]))
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _eager(case: BenchCase) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.rope:
            q, k = eager_rope(q), eager_rope(k)
        group = case.num_heads_q // case.num_heads_kv
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.transpose(-2, -1) * case.head_dim**-0.5
        if case.causal:
            future = torch.ones(case.seqlen, case.seqlen, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    return attend


def _sdpa(case: BenchCase) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.rope:
            q, k = eager_rope(q), eager_rope(k)
        return scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.grouped)

    return attend


def _ours(case: BenchCase) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return drope_kernels.attention(q, k, v, rope=case.rope, causal=case.causal)

    return attend


def _onnxruntime(case: BenchCase) -> Attend:
    """ONNX Runtime's causal GroupQueryAttention; inputs are packed to its layout beforehand."""
    from .onnx_peer import group_query_attention

    return group_query_attention(case)


def contender_names(case: BenchCase, *, compiled: bool = True) -> list[str]:
    """All that can serve the case within the suite's memory and minutes, ours first."""
    names = ["drope_kernels"]
    if case.seqlen <= (32768 if case.backward else 131072):
        names.append("sdpa")
    if case.seqlen <= 2048:  # eager attention holds the whole score matrix, several times
        names.append("eager")
    if compiled and case.seqlen <= 1024:
        names.append("compiled")
    if onnxruntime_serves(case):
        names.append("onnxruntime")
    return names


def onnxruntime_serves(case: BenchCase) -> bool:
    installed = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
    plain = case.dtype == "fp32" and case.causal and not case.rope and not case.backward
    return installed and plain and case.seqlen <= 8192


def contender(name: str, case: BenchCase) -> Attend:
    """Build one contender by name."""
    if name == "compiled":
        return torch.compile(_eager(case), dynamic=False)
    builders = {
        "drope_kernels": _ours,
        "sdpa": _sdpa,
        "eager": _eager,
        "onnxruntime": _onnxruntime,
    }
    return builders[name](case)
