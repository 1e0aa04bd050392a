"""The calls that the stage stress repeats, captures and interleaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import drope_kernels as dk


@dataclass(frozen=True)
class Shape:
    """One attention call; seqlens: packed sequences in place of a batch."""

    name: str
    batch: int = 2
    num_heads_q: int = 8
    num_heads_kv: int = 2
    seqlen_q: int = 1024
    seqlen_kv: int = 1024
    head_dim: int = 128
    causal: bool = True
    rope: bool = False
    window: int | None = None
    row_scale: bool = False
    seqlens: tuple[int, ...] | None = None

    def small(self) -> Shape:
        """The same features within a few dozen tokens, for a dry run."""
        return replace(
            self,
            head_dim=16,
            seqlens=None if self.seqlens is None else (17, 0, 23),
            seqlen_q=min(self.seqlen_q, 40),
            seqlen_kv=min(self.seqlen_kv, 56),
        )


SHAPES = (
    Shape("causal_gqa"),
    Shape("full_64", head_dim=64, seqlen_q=777, seqlen_kv=1521, causal=False),
    Shape("rope", rope=True, num_heads_kv=8, seqlen_q=2048, seqlen_kv=2048),
    Shape("wide_256", head_dim=256, num_heads_q=4, seqlen_q=500, seqlen_kv=900),
    Shape("window_rows_96", head_dim=96, window=300, row_scale=True),
    Shape("packed_rope", rope=True, seqlens=(700, 0, 1, 1300, 64)),
    Shape("many_small", batch=64, num_heads_q=16, num_heads_kv=16, seqlen_q=129, seqlen_kv=129),
)


@dataclass(frozen=True)
class Operands:
    """Leaves q, k, v and, with a row scale, scale; the gradients of out; the call's options."""

    leaves: dict[str, Tensor]
    grad_out: Tensor
    options: dict[str, Any]
    offsets: Tensor | None  # (num_seqs + 1,) of a packed call

    def forward(self, backend: str) -> tuple[Tensor, Tensor]:
        """out and lse."""
        q, k, v = (self.leaves[name] for name in ("q", "k", "v"))
        options = self.options | {"backend": backend}
        if "scale" in self.leaves:
            options["scale"] = self.leaves["scale"]
        if self.offsets is None:
            return dk.attention(q, k, v, return_lse=True, **options)
        return dk.attention_varlen(q, k, v, self.offsets, self.offsets, return_lse=True, **options)

    def train(self, backend: str) -> tuple[Tensor, ...]:
        """out, lse and the gradients of the leaves."""
        out, lse = self.forward(backend)
        leaves = tuple(self.leaves.values())
        grads = torch.autograd.grad(out, leaves, self.grad_out)
        return out.detach(), lse.detach(), *grads


def operands(shape: Shape, device: str, seed: int = 0) -> Operands:
    """bfloat16, standard normal."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    dim = shape.head_dim
    offsets = None
    if shape.seqlens is not None:
        ends = torch.tensor([0, *shape.seqlens]).cumsum(0)
        offsets, total = ends.to(device, torch.int32), int(ends[-1])
        rows: tuple[int, ...] = (shape.num_heads_q, total)
        leaves = {"q": normal(total, shape.num_heads_q, dim)}
        leaves |= {name: normal(total, shape.num_heads_kv, dim) for name in ("k", "v")}
    else:
        rows = (shape.batch, shape.num_heads_q, shape.seqlen_q)
        leaves = {"q": normal(*rows, dim)}
        keys = (shape.batch, shape.num_heads_kv, shape.seqlen_kv, dim)
        leaves |= {name: normal(*keys) for name in ("k", "v")}
    if shape.row_scale:
        leaves["scale"] = normal(*rows, dtype=torch.float32).abs() * dim**-0.5 + 0.05
    options = {"causal": shape.causal, "rope": shape.rope, "window": shape.window}
    grad_out = torch.randn_like(leaves["q"])
    return Operands({n: x.requires_grad_() for n, x in leaves.items()}, grad_out, options, offsets)
