"""Scores of any size: forward, gradients, packed calls and decode, up to the end of float32.

At |s| = 3e6, which released weights reach, the last bit of an lse is 17 % of a probability. So
these fail for a backend whose exponents are anything but differences of scores, times the factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from calls import make_call
from cases import BY_NAME, LARGE_SCORES, OUT_OF_FLOAT16
from checker import BUILT, DTYPES, EMULATED, INTERPRETED, check_case
from decodes import LARGE_SCORES as DECODES
from decodes import check_decode
from operands import int32
from torch import Tensor

import drope_kernels as dk
from drope_kernels import _C

# Backends whose backward is known to form the very scores of its forward, bit for bit. Others do so
# where products are exact, as they are in the named cases.
REPEATS_BITS = ("reference", "cpu")

FP32, BF16, FP16 = DTYPES
HIGHEST = 1.875 * 2.0**127  # 3.19e38, a product of two bf16 numbers


def places() -> Iterator[str]:
    """Names of backends, of the CPU's once an instruction set: cpu/avx2."""
    for backend in (*BUILT, INTERPRETED, *EMULATED):
        yield from (f"cpu/{isa}" for isa in _C.cpu_isas()) if backend == "cpu" else (backend,)


PLACES = tuple(places())


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of a place, ready for calls."""
    name, _, isa = request.param.partition("/")
    if name in EMULATED:
        request.getfixturevalue("backends")
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa or before)
    yield name
    _C.set_cpu_isa(before)


on_every_backend = pytest.mark.parametrize("backend", PLACES, indirect=True)


def dtypes_of(place: str) -> tuple[torch.dtype, ...]:
    return DTYPES[1:] if place in EMULATED else DTYPES


def runs(names: tuple[str, ...]) -> Iterator[Any]:
    """Every place, dtype and case; float16 only where all that it adds is its own range."""
    for place, name in product(PLACES, names):
        for dtype in dtypes_of(place):
            if dtype != FP16 or (name not in OUT_OF_FLOAT16 and place != INTERPRETED):
                label = f"{place}-{str(dtype).removeprefix('torch.')}-{name}"
                yield pytest.param(place, dtype, name, id=label)


def on_runs(names: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("backend", "dtype", "name"), list(runs(names)), indirect=["backend"]
    )


@on_runs(tuple(case.name for case in LARGE_SCORES))
def test_case(backend: str, dtype: torch.dtype, name: str) -> None:
    check_case(BY_NAME[name], dtype, backend)


BY_DECODE_NAME = {case.name: case for case in DECODES}


@on_runs(tuple(BY_DECODE_NAME))
def test_decode(backend: str, dtype: torch.dtype, name: str) -> None:
    check_decode(BY_DECODE_NAME[name], dtype, backend)


def finest(backend: str) -> torch.dtype:
    return BF16 if backend in EMULATED else FP32


# --- one value in all of q, k and v --------------------------------------------------------------


def one_value(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.full(shape, 133120.0 if dtype != FP16 else 57344.0, dtype=dtype)


@pytest.mark.parametrize("seqlen", [1, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_every_backend
def test_equal_numbers_are_their_own_mean(backend: str, dtype: torch.dtype, seqlen: int) -> None:
    """Dense, packed and decoded; their sum and its division round."""
    if dtype == FP32 and backend in EMULATED:
        pytest.skip("it computes float16 and bfloat16")
    x = one_value(dtype, 2, 2, seqlen, 64)
    rows = x[0].transpose(0, 1).contiguous()
    ends = int32(0, 1, seqlen)
    results = {
        "dense": dk.attention(x, x, x, backend=backend),
        "full": dk.attention(x, x, x, causal=False, backend=backend),
        "packed": dk.attention_varlen(rows, rows, rows, ends, ends, backend=backend),
        "decode": dk.attention_decode(
            x[:, :, -1:], x, x, cache_seqlens=int32(seqlen, 1), backend=backend
        ),
    }
    for name, out in results.items():
        error = (out / x.flatten()[0] - 1).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps, name


# --- P, read through values that are a unit matrix -----------------------------------------------


def shifted() -> tuple[Tensor, Tensor]:
    """Scores about -3e6 that no float32 sum holds exactly."""
    generator = torch.Generator().manual_seed(0)
    k = -1880 + torch.randn(1, 1, 16, 16, generator=generator)
    return torch.full((1, 1, 16, 16), 448.0), k


def scattered() -> tuple[Tensor, Tensor]:
    """Scores of either sign up to 4e8."""
    generator = torch.Generator().manual_seed(1)
    q, k = (1e4 * torch.randn(1, 1, 16, 16, generator=generator) for _ in range(2))
    return q, k


def close_together() -> tuple[Tensor, Tensor]:
    """As `shifted`, the differences small: probabilities that are neither 0 nor 1."""
    q, k = shifted()
    q[..., 1:] /= 448
    k[..., 0] = -16 * 1880.0
    return q, k


@pytest.mark.parametrize("scores", [shifted, scattered, close_together], ids=lambda f: f.__name__)
@on_every_backend
def test_rows_of_p_sum_to_one_in_both_passes(backend: str, scores: Any) -> None:
    """And are the same in both: P of the backward is dv where the gradient is a unit matrix."""
    if backend not in REPEATS_BITS:
        pytest.skip("the scores of its two passes need not agree where products are not exact")
    q, k = scores()
    v = torch.eye(16).view(1, 1, 16, 16).clone().requires_grad_()
    p = dk.attention(q, k, v, causal=False, backend=backend)
    (dv,) = torch.autograd.grad(p, v, torch.eye(16).view(1, 1, 16, 16))
    one = torch.ones(16)
    torch.testing.assert_close(p.detach()[0, 0].sum(-1), one, rtol=0, atol=2e-6)
    torch.testing.assert_close(dv[0, 0].sum(-2), one, rtol=0, atol=2e-6)
    torch.testing.assert_close(dv[0, 0].T, p.detach()[0, 0], rtol=0, atol=2e-6)


# --- what forward hands to backward --------------------------------------------------------------


@pytest.mark.parametrize("name", ["near_ties", "near_ties_rows", "softcap", "left_padded"])
@on_every_backend
def test_softmax_state_is_a_reference_and_a_sum(backend: str, name: str) -> None:
    """a in units of scores before the factor, at most 8 octaves from the largest; L to base 2."""
    call = make_call(BY_NAME[name], finest(backend))
    if call.case.softcap is not None and backend in EMULATED:
        pytest.skip("its kernels have no softcap")
    out, lse = call.outputs(call.leaves(), backend)
    state = out.grad_fn.saved_tensors[1]
    assert state.shape == (2, *lse.shape)
    assert state.dtype == torch.float32
    assert state.is_contiguous()
    reference, log_sum = state.double()
    empty = lse.detach() == -torch.inf
    assert (reference[empty] == 0).all()
    assert (log_sum[empty] == torch.inf).all()
    factor = oracle.scale_rows(call, call.leaves().get("scale"), torch.float64).squeeze(-1)
    if call.case.softcap is not None:
        factor = torch.tensor(call.case.softcap).double()
    factor = factor.expand(lse.shape)
    rebuilt = factor * reference + log_sum * math.log(2)
    torch.testing.assert_close(rebuilt[~empty], lse.detach().double()[~empty], rtol=1e-6, atol=1e-5)
    assert (log_sum[~empty] >= -8).all()
    assert (log_sum[~empty] <= math.log2(call.case.seqlen_kv) + 8).all()


# --- the ends of float32 -------------------------------------------------------------------------


def keys_at(scores: tuple[float, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of one query that has these scores at scale 1; 8 channels, values 1, 2, 3, ..."""
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, len(scores), 8)
    q[..., 0] = 2.0**64
    k[..., 0] = torch.tensor([score * 2.0**-64 for score in scores])
    v = torch.arange(1.0, len(scores) + 1).view(1, 1, -1, 1).expand(1, 1, -1, 8)
    return [x.to(dtype).contiguous().requires_grad_() for x in (q, k, v)]


ENDS = {
    "single_highest": ((HIGHEST,), 1.0),
    "single_1e38": ((2.0**126,), 1.0),
    "single_minus_1e38": ((-(2.0**126),), 1.0),
    "single_lowest": ((-HIGHEST,), 1.0),
    "all_lowest": ((-HIGHEST,) * 7, 4.0),
    "all_highest": ((HIGHEST,) * 7, 4.0),
    "many_lowest": ((-HIGHEST,) * 201, 101.0),
    "from_end_to_end": ((-HIGHEST, -1.0, 0.0, HIGHEST), 4.0),
    "from_end_to_end_descending": ((HIGHEST, 0.0, -HIGHEST), 1.0),
    "sentinel_beside_a_score": ((-HIGHEST, -HIGHEST, 1.0, -HIGHEST), 3.0),
    "below_zero": ((-HIGHEST, -(2.0**126), -(2.0**127)), 2.0),
}


@pytest.mark.parametrize("name", ENDS)
@on_every_backend
def test_scores_at_the_ends_of_float32(backend: str, name: str) -> None:
    scores, expected = ENDS[name]
    dtype = finest(backend)
    q, k, v = keys_at(scores, dtype)
    options = {"scale": 1.0, "return_lse": True, "backend": backend}
    out, lse = dk.attention(q, k, v, causal=False, **options)
    assert (out == expected).all(), out
    torch.testing.assert_close(lse.item(), max(scores), rtol=1e-6, atol=0)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    p = torch.tensor([float(score == max(scores)) for score in scores])
    p = (p / p.sum()).to(dtype)
    torch.testing.assert_close(dv[0, 0, :, 0], p)
    with torch.no_grad():
        lengths = int32(len(scores))
        decoded, lse = dk.attention_decode(q, k, v, cache_seqlens=lengths, **options)
    assert (decoded == expected).all(), decoded
    torch.testing.assert_close(lse.item(), max(scores), rtol=1e-6, atol=0)


def test_float64_has_ends_of_its_own() -> None:
    q, v = torch.ones(1, 1, 1, 1).double(), torch.arange(12.0).double().view(1, 1, 12, 1)
    for score in (-1e9, 1e300, -1e300):
        k = torch.full_like(v, score)
        out = dk.attention(q, k, v, scale=1.0, causal=False)
        torch.testing.assert_close(out.item(), 5.5, rtol=1e-12, atol=0)


# --- options at their ends -----------------------------------------------------------------------


def ordinary(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, 2, 20, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    ]


def results(operands: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    out, lse = dk.attention(*operands, return_lse=True, **options)
    return out, lse, *torch.autograd.grad((out, lse), operands, (torch.ones_like(out), lse * 0 + 1))


@pytest.mark.parametrize("softcap", [1e30, 1e38, 3e38])
@on_every_backend
def test_a_softcap_out_of_reach_changes_nothing(backend: str, softcap: float) -> None:
    if backend in EMULATED:
        pytest.skip("its kernels have no softcap")
    operands = ordinary(FP32)
    capped = results(operands, softcap=softcap, backend=backend)
    for ours, expected in zip(capped, results(operands, backend=backend), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["number", "tensor"])
@on_every_backend
def test_a_start_and_a_window_at_the_end_of_int32_see_all_keys(backend: str, start: str) -> None:
    operands = ordinary(finest(backend))
    last = 2**31 - 1
    q_start = int32(last, last) if start == "tensor" else last
    far = results(operands, q_start=q_start, window=2**31 + 20, backend=backend)
    all_keys = results(operands, causal=False, backend=backend)
    none = results(operands, q_start=q_start, window=2**31 - 20, backend=backend)
    for ours, expected in zip(far, all_keys, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (none[0] == 0).all()
    assert (none[1] == -torch.inf).all()
