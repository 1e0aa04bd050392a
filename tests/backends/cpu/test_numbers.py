"""Scores of any size on every instruction set: exact ratios, sums of 1, equal bits in both passes.

Where a test asks for equal bits of calls, its scores are exact: integers below 2^24.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from drope_kernels import Rope, attention, attention_decode

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
FLOAT_MAX = torch.finfo(torch.float32).max


def dtypes(*chosen: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", chosen, ids=[str(one)[6:] for one in chosen])


def run(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, **options: Any) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    out, lse = attention(*leaves.values(), return_lse=True, backend="cpu", **options)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))
    return {"out": out, "lse": lse} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shifted(offset: float, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dO of whole numbers; every score is 1024 * offset more than at offset 0."""
    q, k, v, grad_out = (integers(1, 2, 150, 32, seed=seed) for seed in range(4))
    q[..., 5], k[..., 5] = 1024.0, offset
    return [x.to(dtype) for x in (q, k, v, grad_out)]


# --- ratios of probabilities ---------------------------------------------------------------------


@dtypes(*DTYPES)
@pytest.mark.parametrize("offset", [-8192.0, 8192.0])
def test_what_all_scores_share_changes_nothing(isa: str, offset: float, dtype: torch.dtype) -> None:
    near, far = (run(*shifted(x, dtype), scale=0.25, window=90) for x in (0.0, offset))
    for name in ("out", "dk", "dv"):
        assert torch.equal(near[name], far[name]), name
    others = torch.arange(32) != 5  # in channel 5 dq is a sum of dS times the offset
    assert torch.equal(near["dq"][..., others], far["dq"][..., others])
    assert torch.allclose(near["lse"] + 256 * offset, far["lse"], rtol=2e-7)


@dtypes(torch.float32, torch.bfloat16)
def test_equal_keys_share_alike(isa: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 40, 64), 133120.0, dtype=dtype)
    out = attention(x, x, x, backend="cpu")
    assert torch.allclose(out, x, rtol=1e-6)


# --- the ends of float32 -------------------------------------------------------------------------


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("score", [-3e38, -1e38, -1e30, 1e30, 3e38])
@pytest.mark.parametrize("num_keys", [1, 40])
def test_any_finite_score(isa: str, num_keys: int, score: float, dtype: torch.dtype) -> None:
    """A score is never taken for a hidden key, and keys of one score share alike."""
    root = torch.tensor(math.sqrt(abs(score))).to(dtype)
    q = torch.full((1, 1, num_keys + 3, 1), float(root) * math.copysign(1, score), dtype=dtype)
    k = torch.full((1, 1, num_keys, 1), float(root), dtype=dtype)
    v = integers(1, 1, num_keys, 24, seed=0).to(dtype)
    grad_out = torch.ones(1, 1, num_keys + 3, 24)
    results = run(q, k, v, grad_out, scale=1.0)
    assert results["out"][:, :, :3].count_nonzero() == 0  # rows without keys
    assert results["lse"][:, :, :3].eq(-math.inf).all()
    counts = torch.arange(1, num_keys + 1)[:, None]
    tolerance: dict[str, Any] = (
        {"rtol": 1e-2, "atol": 1e-2} if dtype in HALF else {"rtol": 1e-5, "atol": 1e-6}
    )
    assert torch.allclose(
        results["out"][0, 0, 3:].float(), v[0, 0].float().cumsum(0) / counts, **tolerance
    )
    exact = (q[0, 0, 0, 0].double() * k[0, 0, 0, 0].double()).float()
    assert torch.allclose(results["lse"][0, 0, 3:], exact.expand(num_keys), rtol=2e-7)
    shares = (1 / counts).flip(0).cumsum(0).flip(0)  # key j has 1 / (i + 1) of each row i >= j
    assert torch.allclose(results["dv"][0, 0].float(), shares.expand(-1, 24), **tolerance)
    assert results["dq"].isfinite().all()


@dtypes(torch.float32, torch.bfloat16)
def test_scores_as_far_apart_as_there_are(isa: str, dtype: torch.dtype) -> None:
    """From -3e38 to 3e38 the difference of two scores overflows, and the lower weighs nothing."""
    k = (
        torch.tensor([-1.7e19, 1.7e19, 1.0, -1.7e19])
        .to(dtype)
        .reshape(1, 1, 4, 1)
        .repeat(1, 1, 9, 1)
    )
    q = torch.full((1, 1, 36, 1), 1.7e19, dtype=dtype)
    v = torch.arange(36, dtype=dtype).reshape(1, 1, 36, 1).repeat(1, 1, 1, 8)
    results = run(q, k, v, torch.ones(1, 1, 36, 8), scale=1.0)
    row = torch.arange(36)
    mean = ((row + 3) // 4 * 2 - 1.0).clamp(min=0)  # of keys 1, 5, 9, .. up to the row
    assert torch.allclose(results["out"][0, 0, :, 0].float(), mean, rtol=1e-2, atol=1e-5)
    assert results["dv"].isfinite().all()
    shared = results["dv"].float()[0, 0, :, 0]
    assert shared[0] == pytest.approx(1.0)  # row 0 sees nothing else
    assert shared[row % 4 != 1][1:].count_nonzero() == 0


@pytest.mark.parametrize("softcap", [1e36, 3e38, FLOAT_MAX])
def test_softcap_that_caps_nothing(isa: str, softcap: float) -> None:
    q, k, v, grad_out = (normal(1, 2, 70, 48, seed=seed) for seed in range(4))
    capped, free = (run(4 * q, k, v, grad_out, softcap=cap) for cap in (softcap, None))
    for name, x in free.items():
        assert torch.allclose(capped[name], x, rtol=1e-4, atol=1e-5), name


def test_softcap_near_zero_makes_keys_equal(isa: str) -> None:
    q, k, v, grad_out = (normal(1, 1, 20, 8, seed=seed) for seed in range(4))
    q[:, :, 4], k[:, :, 3] = 0.0, 0.0
    results = run(q, k, v, grad_out, softcap=1.2e-38)
    mean = v.cumsum(2) / torch.arange(1, 21)[:, None]
    assert torch.allclose(results["out"], mean, rtol=1e-5, atol=1e-6)
    assert all(x.isfinite().all() for x in results.values())


@pytest.mark.parametrize("q_start", [2**31 - 1, 2**31 - 100])
def test_window_as_wide_as_indices_are(isa: str, q_start: int) -> None:
    q, k, v, grad_out = (normal(1, 2, 50, 16, seed=seed) for seed in range(4))
    far = run(q, k, v, grad_out, q_start=q_start, window=2**31)
    near = run(q, k, v, grad_out, q_start=100, window=2**31 - q_start + 100)
    for name, x in near.items():
        assert torch.equal(far[name], x), name


# --- both passes ---------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 5e6},
    "rope": {"rope": Rope(dim=20, attention_factor=1.1)},
    "rows": {"scale": torch.linspace(0.1, 0.3, 150)},
    "window": {"window": 70, "causal": False},
}


@dtypes(*DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_backward_has_the_probabilities_of_forward(isa: str, form: str, dtype: torch.dtype) -> None:
    """v and dO are the identity: out is P, dv its transpose. The last bit of a score of 3e6
    is more than a tenth of a probability."""
    q, k = (normal(1, 1, 150, 40, seed=seed) for seed in range(2))
    q[..., 30], k[..., 30] = 4000.0, 4000.0
    one = torch.eye(150)[None, None].to(dtype)
    results = run(q.to(dtype), k.to(dtype), one, one, **FORMS[form])
    p, p_again = results["out"].float(), results["dv"].float().mT
    assert (p.max(dim=-1).values < 0.9).any()  # near ties, or nothing would be compared
    tolerance: dict[str, Any] = (
        {"rtol": 2e-2, "atol": 1e-4} if dtype in HALF else {"rtol": 3e-6, "atol": 1e-30}
    )
    assert torch.allclose(p, p_again, **tolerance)
    assert torch.allclose(
        p_again.sum(dim=-1), torch.ones(150), atol=2e-2 if dtype in HALF else 1e-6
    )


# --- decode --------------------------------------------------------------------------------------


@dtypes(*DTYPES)
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("page_size", [None, 500])
def test_parts_of_a_split_decode_merge_exactly(
    isa: str, page_size: int | None, num_queries: int, dtype: torch.dtype
) -> None:
    """5000 keys are three parts; of each the maximum and the sum are kept, not a logarithm."""
    results = []
    for offset in (0.0, -8192.0):
        q = integers(1, 4, num_queries, 32, seed=0)
        k, v = (integers(1, 2, 5000, 32, seed=seed) for seed in (1, 2))
        q[..., 5], k[..., 5] = 1024.0, offset
        page_table = None
        if page_size is not None:
            k, v = (x.unflatten(2, (-1, page_size))[0].transpose(0, 1).contiguous() for x in (k, v))
            page_table = torch.arange(5000 // page_size, dtype=torch.int32)[None]
        out = attention_decode(
            *(x.to(dtype) for x in (q, k, v)),
            cache_seqlens=torch.tensor([5000], dtype=torch.int32),
            page_table=page_table,
            scale=0.25,
            backend="cpu",
        )
        results.append(out)
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_decode_at_the_ends_of_float32(isa: str) -> None:
    """Each part of the keys has one score, -3e38 or 3e38, and only the last has the larger."""
    q = torch.full((1, 1, 1, 1), 1.7e19)
    k = torch.full((1, 1, 5000, 1), -1.7e19)
    v = integers(1, 1, 5000, 8, seed=0)
    options: dict[str, Any] = {
        "cache_seqlens": torch.tensor([5000], dtype=torch.int32),
        "scale": 1.0,
        "backend": "cpu",
    }
    assert torch.allclose(attention_decode(q, k, v, **options), v.mean(2, keepdim=True), atol=1e-5)
    k[:, :, 4998:] = 1.7e19
    expected = v[:, :, 4998:].mean(2, keepdim=True)
    assert torch.allclose(attention_decode(q, k, v, **options), expected, atol=1e-5)
