"""The mended interpreter computes as torch and the GPU do, and what `mend` replaces needs it.

When a new Triton is right by itself, the tests of the second half say which repair may go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from interpreter import MENDED, UNMENDED
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import drope_kernels as dk
from drope_kernels.call import dispatch

SIZE = 1024
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


@triton.jit
def round_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


@triton.jit
def widen_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(tl.float32))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def fma_kernel(x, y, z, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


@triton.jit
def copy_kernel(x, out, num_rows, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < num_rows), mask=at < num_rows)


def numbers(seed: int, size: int = SIZE) -> Tensor:
    """float32 of many magnitudes, ties between bfloat16 numbers, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * 10.0 ** torch.arange(size).remainder(9)
    ties = (x[: size // 4].bfloat16().float().view(torch.int32) + 0x8000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.3895e38, 1e-40])
    return torch.cat([ties, special, x])[:size]


def narrowed() -> tuple[Tensor, Tensor]:
    x = numbers(1)
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, SIZE=SIZE)
    return out, x.bfloat16()


def multiplied(size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(size, size, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(size, size)
    dot_kernel[(1,)](a, b, out, SIZE=size)
    return out, a.float() @ b.float()


def fused() -> tuple[Tensor, Tensor]:
    """What a product lost by rounding, as the angles of far positions need it."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(SIZE, generator=generator) for _ in range(2))
    z = -(x * y)
    out = torch.empty(SIZE)
    fma_kernel[(1,)](x, y, z, out, SIZE=SIZE)
    return out, (x.double() * y.double() + z.double()).float()


# ---- mended ------------------------------------------------------------------------------------
def test_float32_rounds_to_bfloat16_as_torch_rounds() -> None:
    torch.testing.assert_close(*narrowed(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_widens_to_the_same_number() -> None:
    x = numbers(1).bfloat16()
    out = torch.empty(SIZE)
    widen_kernel[(1,)](x, out, SIZE=SIZE)
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


def test_dot_of_bfloat16_is_that_of_its_numbers() -> None:
    torch.testing.assert_close(*multiplied())


def test_fma_rounds_once() -> None:
    ours, exact = fused()
    assert exact.abs().max() > 0
    assert torch.equal(ours, exact)


def test_access_outside_the_tensors_is_refused() -> None:
    x, out = torch.zeros(SIZE), torch.zeros(SIZE)
    copy_kernel[(1,)](x, out, SIZE, SIZE=2 * SIZE)
    for short in ((x[:-1].clone(), out), (x, out[:-1].clone())):
        with pytest.raises(Exception, match="1 elements of 4 bytes beyond their tensor"):
            copy_kernel[(1,)](*short, SIZE, SIZE=2 * SIZE)


# ---- not mended --------------------------------------------------------------------------------
@contextmanager
def unmended(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, name, UNMENDED[name])
        yield


def test_every_repair_is_in_place() -> None:
    for name in MENDED:
        assert getattr(InterpreterBuilder, name) is getattr(interpreter, name)


def test_repair_of_the_cast_is_still_needed() -> None:
    with unmended("cast_impl"):
        ours, expected = narrowed()
    assert not torch.equal(ours.nan_to_num(), expected.nan_to_num())


def test_repair_of_the_dot_is_still_needed() -> None:
    with unmended("create_dot"):
        ours, expected = multiplied()
    assert not torch.allclose(ours, expected, rtol=1.0)


@pytest.mark.skipif(VERSION >= (3, 9), reason="Triton 3.9 fuses: only older ones need the repair")
def test_repair_of_the_fma_is_still_needed() -> None:
    with unmended("create_fma"):
        ours, exact = fused()
    assert not torch.equal(ours, exact)


# ---- the backend under its name ----------------------------------------------------------------
def test_nobody_gets_the_interpreter_without_asking() -> None:
    assert "interpreted-triton" not in dk.available_backends()
    assert set(dk.available_backends()) <= {"cuda", "triton", "cpu", "reference"}
    q = torch.zeros(1, 1, 4, 16)
    assert "interpreted-triton" not in dk.explain(q, q, q)
    assert dispatch._load("interpreted-triton").unavailable() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_triton_says_so() -> None:
    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r'"triton", which cannot: .*cpu'):
        dk.attention(q, q, q, backend="triton")
    assert "triton" not in dk.available_backends()
