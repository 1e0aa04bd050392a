"""Scores of any size on the emulated device: exponents, and what a row leaves to other passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from emulation.attention import SM80, SM90A, EmulatedBackend, build_module, load_backends
from torch import Tensor

from drope_kernels.backends import reference
from drope_kernels.spec.spec import AttentionInputs, DecodeInputs

BF16 = torch.bfloat16
LOG2E = 1 / math.log(2)
MODERATE = 2.0**20  # |c' a| up to which the sm_90a forward forms exponents in one instruction
LARGE = 177 * 2**14  # the big part of scores: a product of two bfloat16 numbers, and exact
on_both = pytest.mark.parametrize("name", [SM80.name, SM90A.name])
Backends = dict[str, EmulatedBackend]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def dense(
    q: Tensor, k: Tensor, *, scale: float, causal: bool = False, q_start: int = 0
) -> AttentionInputs:
    return AttentionInputs(
        q=q,
        k=k,
        v=values(*k.shape, seed=7),
        scale=scale,
        causal=causal,
        window=None,
        softcap=None,
        q_start=q_start,
        kv_start=None,
        kv_end=None,
        rotation=None,
    )


def integer_scores(big: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k of 64 channels and t (1, 1, Sq, Skv), t_ij = LARGE big_i + small_j, all of them exact.

    big (Sq,) of -1, 0, 1; small (Skv,) integers that bfloat16 holds.
    """
    q, k = (torch.zeros(1, 1, len(x), 64, dtype=torch.float64) for x in (big, small))
    q[..., 0], k[..., 0] = big * 2**14, LARGE / 2**14
    q[..., 1], k[..., 1] = 1, small
    return q.to(BF16), k.to(BF16), q @ k.transpose(-1, -2)


# 200 queries whose rows stand between others in their warp, 300 keys that grow to either end.
SIGNS = torch.tensor([1, -1, 0, 1, 1]).repeat(40).double()
RISING = (torch.arange(300) // 34).double()


@pytest.mark.parametrize("small", [RISING, RISING.flip(0)], ids=["rising", "falling"])
@pytest.mark.parametrize("times", [0.5, 1.0, 2.0, 40.0])
@on_both
def test_rows_whose_scores_come_to_the_limit(
    backends: Backends, name: str, times: float, small: Tensor
) -> None:
    """The maximum of a row passes the limit, up or down, while earlier keys still weigh."""
    q, k, t = integer_scores(SIGNS, small)
    scale = float(torch.tensor(times * MODERATE / LOG2E / (LARGE + 4)))  # the limit is at 4
    inputs = dense(q, k, scale=scale)
    out, lse, state, *_ = backends[name].forward(inputs, save_prepared=True)

    a = t.amax(-1)
    weight = torch.exp2(scale * LOG2E * (t - a[..., None]))
    log2_sum = weight.sum(-1).log2()
    assert torch.equal(state[0].double(), a)
    torch.testing.assert_close(state[1].double(), log2_sum, atol=4e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), scale * a + log2_sum / LOG2E, atol=1e-5, rtol=3e-7)
    p = weight / weight.sum(-1, keepdim=True)
    torch.testing.assert_close(out.double(), p @ inputs.v.double(), atol=8e-3, rtol=8e-3)


@pytest.mark.parametrize("deterministic", [False, True])
@on_both
def test_probabilities_of_backward_are_those_of_forward(
    backends: Backends, name: str, deterministic: bool
) -> None:
    """dv_j = sum_i p_ij where dO is 1; a rounded lse would have them off by 17 %."""
    q, k, t = integer_scores(SIGNS, torch.arange(300) % 7)
    inputs = dense(q, k, scale=1.0)
    backend = backends[name]
    out, _, state, *_ = backend.forward(inputs, save_prepared=True)
    torch.use_deterministic_algorithms(deterministic)
    ones = torch.ones_like(out)
    _, _, dv, _ = backend.backward(inputs, out, state, ones, None, need_grad_scale=False)
    expected = t.softmax(-1).sum(-2)[..., None].expand(dv.shape)
    torch.testing.assert_close(dv.double(), expected, atol=1e-6, rtol=8e-3)


@on_both
def test_the_gradient_of_large_scores(backends: Backends, name: str) -> None:
    q, k, t = integer_scores(SIGNS, torch.arange(300) % 7)
    inputs = dense(q, k, scale=1.0)
    backend = backends[name]
    out, _, state, *_ = backend.forward(inputs, save_prepared=True)
    grad_out = values(*out.shape, seed=3)
    dq, dk, *_ = backend.backward(inputs, out, state, grad_out, None, need_grad_scale=False)
    p = t.softmax(-1)
    dp = grad_out.double() @ inputs.v.double().transpose(-1, -2)
    ds = p * (dp - (grad_out.double() * out.double()).sum(-1, keepdim=True))
    exact = ds @ k.double(), ds.transpose(-1, -2) @ q.double()
    for ours, expected in zip((dq, dk), exact, strict=True):
        small = expected[..., 1]  # the channel that the large part of the scores is not in
        assert (ours[..., 1].double() - small).abs().max() < 0.02 * small.abs().max()


def far_apart() -> tuple[Tensor, Tensor]:
    """Scores to either side of what float32 differences can hold."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.zeros(1, 1, 70, 64), torch.zeros(1, 1, 150, 64)
    q[..., 0] = 1.0
    k[..., 0] = (torch.rand(1, 1, 150, generator=generator) * 2 - 1) * 3e38
    return q.to(BF16), k.to(BF16)


EXTREMES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "133120": lambda: (torch.full((1, 1, 1, 64), 133120.0, dtype=BF16),) * 2,
    "ties": lambda: (torch.full((1, 1, 40, 64), 133120.0, dtype=BF16),) * 2,
    "about 1e10": lambda: (values(1, 1, 70, 64) * 1e5, values(1, 1, 150, 64, seed=1) * 1e5),
    "far apart": far_apart,
    "one lowest": lambda: (
        torch.tensor([-1.0] + 63 * [0.0], dtype=BF16).view(1, 1, 1, 64),
        torch.full((1, 1, 1, 64), torch.finfo(BF16).max, dtype=BF16),
    ),
    "all lowest": lambda: (
        torch.tensor([-1.0] + 63 * [0.0], dtype=BF16).expand(1, 1, 70, 64),
        torch.full((1, 1, 150, 64), torch.finfo(BF16).max, dtype=BF16),
    ),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("causal", [False, True])
@on_both
def test_finite_scores_have_a_finite_softmax(
    backends: Backends, name: str, causal: bool, case: str
) -> None:
    q, k = (x.contiguous() for x in EXTREMES[case]())
    shift = k.shape[2] - q.shape[2]
    inputs = dense(q, k, causal=causal, q_start=shift, scale=0.125)
    out, lse, state, *_ = backends[name].forward(inputs, save_prepared=True)
    t = q.double() @ k.double().transpose(-1, -2)
    if causal:
        t = t.masked_fill(~torch.ones_like(t).tril(shift).bool(), -torch.inf)
    expected = (0.125 * t).softmax(-1) @ inputs.v.double()
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(state[0].double(), t.amax(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse.double(), (0.125 * t).logsumexp(-1), rtol=1e-6, atol=1e-5)
    if k.abs().max() < 1e30:  # else sums of dS k overflow
        grads = backends[name].backward(inputs, out, state, out, None, need_grad_scale=False)
        assert all(x.isfinite().all() for x in grads)


@on_both
def test_the_state_of_rows_that_see_no_key(backends: Backends, name: str) -> None:
    q, k = values(1, 2, 40, 64), values(1, 2, 20, 64, seed=1)
    inputs = dense(q, k, causal=True, q_start=-30, scale=0.125)
    _, lse, state, *_ = backends[name].forward(inputs, save_prepared=True)
    assert (state[0, ..., :30] == 0).all()
    assert (state[1, ..., :30] == torch.inf).all()
    assert (lse[..., :30] == -torch.inf).all()
    assert state[:, ..., 30:].isfinite().all()


@on_both
def test_a_call_that_keeps_nothing_has_no_state(backends: Backends, name: str) -> None:
    inputs = dense(values(1, 1, 3, 64), values(1, 1, 5, 64, seed=1), scale=0.125)
    assert backends[name].forward(inputs, save_prepared=False)[2].shape == (0,)


@on_both
@pytest.mark.parametrize("window", [2**31, 2**31 - 20, 2**40])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_windows_at_the_end_of_an_int32(
    backends: Backends, name: str, causal: bool, window: int
) -> None:
    inputs = dense(values(1, 1, 90, 64), values(1, 1, 150, 64, seed=1), causal=causal, scale=0.125)
    start = torch.tensor([2**31 - 1], dtype=torch.int32)
    inputs = replace(inputs, q_start=start, window=window)
    ours = backends[name].forward(inputs, save_prepared=True)
    expected = reference.forward(inputs, save_prepared=True)
    torch.testing.assert_close(ours[0], expected[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-5, rtol=1e-6)
    grads, exact = (
        backend.backward(inputs, *results[:1], results[2], expected[0], None, need_grad_scale=False)
        for backend, results in ((backends[name], ours), (reference, expected))
    )
    for got, want in zip(grads[:3], exact[:3], strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


# ---- decode --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def decoders() -> dict[int, EmulatedBackend]:
    """By the number of their processors: few leave the keys of a row together, many split them."""
    devices = {count: replace(SM80, name=f"emulated-{count}", num_sms=count) for count in (1, 64)}
    return dict(zip(devices, load_backends(build_module(), *devices.values()), strict=True))


@pytest.mark.parametrize("num_sms", [1, 64])
@pytest.mark.parametrize("signs", [(1,), (-1, 0, 1)], ids=["one row", "three rows"])
def test_parts_of_a_row_join_by_their_scores(
    decoders: dict[int, EmulatedBackend], signs: tuple[int, ...], num_sms: int
) -> None:
    """Warps and splits see other maxima of one row; each row has a scale of its own."""
    rows, keys = len(signs), 260
    q, k, t = integer_scores(torch.tensor(signs).double(), torch.arange(keys) // 23)
    scale = torch.tensor([0.5, 1.0, 3.0])[:rows].view(1, 1, rows)
    inputs = DecodeInputs(
        q=q,
        k_cache=k,
        v_cache=values(1, 1, keys, 64, seed=7),
        k=None,
        v=None,
        cache_seqlens=torch.tensor([keys], dtype=torch.int32),
        page_table=None,
        scale=scale,
        window=None,
        softcap=None,
        kv_start=None,
        rotation=None,
        rotated_cache=False,
    )
    out, lse = decoders[num_sms].decode(inputs)
    seen = torch.ones(rows, keys).tril(keys - rows).bool()
    s = (scale.double()[..., None] * t).masked_fill(~seen, -torch.inf)
    expected = s.softmax(-1) @ inputs.v_cache.double()
    torch.testing.assert_close(out.double(), expected, atol=8e-3, rtol=8e-3)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), atol=1e-5, rtol=3e-7)
