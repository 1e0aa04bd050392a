"""attention_varlen: sequences of any length in one packed call, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import make_call
from cases import Case, RopeCase
from checker import BACKENDS, EMULATED, INTERPRETED, check_drawn
from operands import int32
from torch import Tensor

import drope_kernels as dk
from drope_kernels.call import ops

on_every_backend = pytest.mark.parametrize("backend", [*BACKENDS, *EMULATED], indirect=True)
HQ, HKV, D = 4, 2, 16


def dtype_on(backend: str) -> torch.dtype:
    """The finest dtype that the backend computes."""
    return torch.bfloat16 if backend in EMULATED else torch.float32


def packed(
    rows_q: int, rows_k: int, dtype: torch.dtype, *, num_heads: int = HQ
) -> tuple[Tensor, ...]:
    """q (rows_q, Hq, D), k and v (rows_k, Hkv, D)."""
    generator = torch.Generator().manual_seed(rows_q + rows_k)
    shapes = ((rows_q, num_heads, D), (rows_k, HKV, D), (rows_k, HKV, D))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


# --- sequences and batches -----------------------------------------------------------------------


@pytest.mark.parametrize("rope", [False, True])
@on_every_backend
def test_packed_equals_batched(backend: str, rope: bool) -> None:
    """Sequences of one length are a batch."""
    batch, rows = 3, 20
    operands = packed(batch * rows, batch * rows, dtype_on(backend))
    ends = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32)
    options: dict[str, Any] = {"rope": rope, "window": 7, "return_lse": True, "backend": backend}
    out, lse = dk.attention_varlen(*operands, ends, ends, **options)
    batched = (x.unflatten(0, (batch, rows)).transpose(1, 2) for x in operands)
    expected, expected_lse = dk.attention(*batched, **options)
    torch.testing.assert_close(out.unflatten(0, (batch, rows)).transpose(1, 2), expected)
    torch.testing.assert_close(lse.unflatten(1, (batch, rows)).transpose(0, 1), expected_lse)


@on_every_backend
def test_packed_sequences_do_not_see_each_other(backend: str) -> None:
    ends = int32(0, 9, 9, 30)
    q, k, v = packed(30, 30, dtype_on(backend))
    options: dict[str, Any] = {"causal": False, "rope": True, "backend": backend}
    before = dk.attention_varlen(q, k, v, ends, ends, **options)
    k[:9], v[:9] = 100.0, float("inf")
    after = dk.attention_varlen(q, k, v, ends, ends, **options)
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])


@on_every_backend
def test_packed_positions_default_to_each_sequences_own(backend: str) -> None:
    call = (*packed(11, 17, dtype_on(backend)), int32(0, 4, 11), int32(0, 10, 17))
    positions = torch.tensor([*range(6, 10), *range(7)])  # the last query sits at the last key
    kv_positions = torch.tensor([*range(10), *range(7)])
    default = dk.attention_varlen(*call, rope=True, backend=backend)
    given = dk.attention_varlen(
        *call, rope=True, positions=positions, kv_positions=kv_positions, backend=backend
    )
    torch.testing.assert_close(default, given)
    shifted = dk.attention_varlen(
        *call, rope=True, positions=positions + 1, kv_positions=kv_positions, backend=backend
    )
    assert not torch.allclose(default, shifted, atol=1e-3)


# --- many documents ------------------------------------------------------------------------------


def lengths(count: int, most: int, seed: int) -> tuple[int, ...]:
    """Lengths from 0 on, a third of them 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, most + 1, (count,), generator=generator)
    return tuple((drawn * (torch.rand(count, generator=generator) > 1 / 3)).tolist())


def documents(
    name: str, seqlens_q: tuple[int, ...], seqlens_kv: tuple[int, ...], **rest: Any
) -> Case:
    totals = {"seqlen_q": sum(seqlens_q), "seqlen_kv": sum(seqlens_kv)}
    return Case(name, batch=1, **totals, seqlens_q=seqlens_q, seqlens_kv=seqlens_kv, **rest)


SHORT, MIXED = lengths(135, 3, seed=1), lengths(8, 70, seed=2)
DOCUMENTS = (
    documents("documents", MIXED, MIXED, rope=RopeCase()),
    documents("documents_and_others", MIXED, MIXED[::-1], num_heads_q=4, scale="row", causal=False),
    # More than a kernel looks at in one step when it searches for the sequence of a tile.
    documents("many_short_documents", SHORT, SHORT, num_heads_q=1, num_heads_kv=1, rope=RopeCase()),
    documents(
        "empty_but_the_last", (0,) * 130 + (5,), (0,) * 130 + (9,), num_heads_q=1, num_heads_kv=1
    ),
)


@pytest.mark.parametrize("case", DOCUMENTS, ids=lambda case: case.name)
@on_every_backend
def test_documents(backend: str, case: Case) -> None:
    """Outputs, lse and gradients; the oracle takes one sequence after the other."""
    check_drawn(make_call(case, dtype_on(backend)), backend)


# --- ends that only the device knows -------------------------------------------------------------

LARGEST = 2**31 - 1
NONSENSE = ((0, 40, 20, 30), (-5, 10, 20, 30), (0, 10, 20, 400), (LARGEST, -LARGEST, 7, LARGEST))


@pytest.mark.parametrize("ends", NONSENSE, ids=str)
@pytest.mark.parametrize("backend", [INTERPRETED, *EMULATED], indirect=True)
def test_nonsense_as_ends_stays_within_the_tensors(
    backend: str, ends: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where values are never read on the host: whatever comes out, what lies around is intact."""
    monkeypatch.setattr(ops, "check_values", lambda *_, **__: None)
    around = packed(90, 90, dtype_on(backend))
    intact = [x.clone() for x in around]
    inner = [x[30:60].detach().requires_grad_() for x in around]
    out = dk.attention_varlen(*inner, int32(*ends), int32(*ends), rope=True, backend=backend)
    torch.autograd.grad(out, inner, torch.ones_like(out))
    for was, now in zip(intact, around, strict=True):
        assert torch.equal(was, now)
