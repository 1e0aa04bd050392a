"""merge_attention: parts of the keys attended to apart are the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from operands import int32
from torch import Tensor

import drope_kernels as dk

HQ, HKV, D = 4, 2, 16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


SPLITS = ((0, 10, 10, 31, 40), (0, 40), (0, 0, 40, 40))


@pytest.mark.parametrize("bounds", SPLITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_joins_disjoint_keys(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    """Parts over ranges of the keys, some empty, some with rows that see nothing, are the whole."""
    q = normal(2, HQ, 20, D, dtype=dtype).requires_grad_()
    k = normal(2, HKV, 40, D, seed=1, dtype=dtype).requires_grad_()
    v = normal(2, HKV, 40, D, seed=2, dtype=dtype).requires_grad_()
    options: dict[str, Any] = {"window": 9, "return_lse": True, "backend": "reference"}
    parts = [
        dk.attention(q, k, v, kv_start=int32(low, low), kv_end=int32(high, high), **options)
        for low, high in pairwise(bounds)
    ]
    out, lse = dk.merge_attention(*zip(*parts, strict=True))
    whole, whole_lse = dk.attention(q, k, v, **options)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    seeds = normal(*out.shape, seed=3, dtype=dtype), normal(*lse.shape, seed=4, dtype=lse.dtype)
    ours = torch.autograd.grad((out, lse), (q, k, v), seeds)
    expected = torch.autograd.grad((whole, whole_lse), (q, k, v), seeds)
    for got, want in zip((out, lse, *ours), (whole, whole_lse, *expected), strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_merge_of_empty_parts_is_empty() -> None:
    outs = [torch.zeros(1, 2, 3, 4, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 2, 3), -torch.inf).requires_grad_() for _ in range(2)]
    out, lse = dk.merge_attention(outs, lses)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), [*outs, *lses])
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("mark", [-torch.inf, torch.inf])
@pytest.mark.parametrize("content", [torch.nan, torch.inf, 7.0])
def test_empty_parts_of_other_libraries_add_nothing(mark: float, content: float) -> None:
    """Rows that saw no key: lse -inf beside NaN, or +inf as FlashAttention-2 writes it."""
    outs = [normal(1, 2, 3, 4, seed=n).requires_grad_() for n in range(2)]
    lses = [normal(1, 2, 3, seed=5 + n).requires_grad_() for n in range(2)]
    foreign = torch.full((1, 2, 3, 4), content).requires_grad_()
    empty = torch.full((1, 2, 3), mark).requires_grad_()
    expected = dk.merge_attention(outs, lses)
    merged = dk.merge_attention([outs[0], foreign, outs[1]], [lses[0], empty, lses[1]])
    seeds = normal(1, 2, 3, 4, seed=8), normal(1, 2, 3, seed=9)
    ours = torch.autograd.grad(merged, [*outs, *lses, foreign, empty], seeds)
    theirs = torch.autograd.grad(expected, [*outs, *lses], seeds)
    zeros = (torch.zeros_like(foreign), torch.zeros_like(empty))
    for got, want in zip((*merged, *ours), (*expected, *theirs, *zeros), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    alone, alone_lse = dk.merge_attention([foreign, foreign], [empty, empty])
    assert (alone == 0).all()
    assert (alone_lse == -torch.inf).all()


def test_merge_gradients_are_derivatives() -> None:
    outs = [normal(1, 2, 3, 2, seed=n, dtype=torch.float64).requires_grad_() for n in range(3)]
    lses = [normal(1, 2, 3, seed=9 + n, dtype=torch.float64).requires_grad_() for n in range(3)]

    def merged(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return dk.merge_attention(list(parts[:3]), list(parts[3:]))

    assert torch.autograd.gradcheck(merged, (*outs, *lses))
