"""What the emulated CUDA kernels execute, counted, and what must not change their results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import Call, make_call
from cases import BY_NAME, CASES, Case
from checker import EMULATED
from emulation.attention import SM80, SM90A, EmulatedBackend, emulated
from emulation.library import RANDOM
from torch import Tensor

import drope_kernels as dk

pytestmark = pytest.mark.usefixtures("backends")

Backends = dict[str, EmulatedBackend]
BF16 = torch.bfloat16

on_both = pytest.mark.parametrize("name", EMULATED)


def these(*names: str) -> pytest.MarkDecorator:
    cases = [BY_NAME[name] for name in names]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# ---- operations, counted -----------------------------------------------------------------------
def dense(heads: int, seqlen_q: int, seqlen_kv: int, head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, rows, head_dim) for rows in (seqlen_q, seqlen_kv, seqlen_kv)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def blocks(rows: int, block: int) -> int:
    return -(-rows // block)


def count(backend: EmulatedBackend, operands: list[Tensor], *, causal: bool) -> dict[str, int]:
    dk.attention(*operands, causal=causal, backend=backend.NAME)
    return backend.counts


MMA_PRODUCTS, WGMMA_ROWS, K = 16 * 8 * 16, 64, 16


@pytest.mark.parametrize(
    ("head_dim", "block_q", "block_kv", "rows_of_warp"),
    [(64, 128, 128, 32), (96, 128, 64, 32), (128, 128, 64, 32), (256, 128, 32, 16)],
)
def test_sm80_forward_multiplies_as_its_tiles_say(
    backends: Backends, head_dim: int, block_q: int, block_kv: int, rows_of_warp: int
) -> None:
    heads, seqlen_q, seqlen_kv = 2, 200, 300
    ran = count(backends[SM80.name], dense(heads, seqlen_q, seqlen_kv, head_dim), causal=False)
    tiles, passes = heads * blocks(seqlen_q, block_q), blocks(seqlen_kv, block_kv)
    assert ran["mma"] == tiles * passes * 2 * block_q * block_kv * head_dim // MMA_PRODUCTS
    warps = block_q // rows_of_warp
    fragments = rows_of_warp // 16
    scores = head_dim // K * (fragments + block_kv // 16)
    values = block_kv // K * (head_dim // 16)
    assert ran["ldmatrix"] == tiles * passes * warps * (scores + values)
    chunks = head_dim // 8
    assert ran["cp_async"] == tiles * chunks * (block_q + 2 * passes * block_kv)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "consumers", "block_kv"), [(64, 3, 128), (128, 2, 128)])
def test_sm90_forward_multiplies_as_its_tiles_say(
    backends: Backends, head_dim: int, consumers: int, block_kv: int, causal: bool
) -> None:
    heads, seqlen = 3, 400  # more tiles than processors
    ran = count(backends[SM90A.name], dense(heads, seqlen, seqlen, head_dim), causal=causal)
    block_q = consumers * WGMMA_ROWS
    tiles = heads * blocks(seqlen, block_q)
    ends = [min(start + block_q, seqlen) for start in range(0, seqlen, block_q)]
    passes = heads * sum(blocks(end if causal else seqlen, block_kv) for end in ends)
    assert ran["wgmma"] == passes * consumers * (head_dim // K + block_kv // K)
    slabs = head_dim // 64
    assert ran["tensor_load"] == slabs * (tiles * consumers + 2 * passes)
    assert ran["mma"] == ran["ldmatrix"] == ran["cp_async"] == 0


@pytest.mark.parametrize(
    ("head_dim", "block_kv", "block_q"), [(64, 128, 64), (96, 64, 64), (128, 64, 64)]
)
def test_sm80_backward_multiplies_as_its_tiles_say(
    backends: Backends, head_dim: int, block_kv: int, block_q: int
) -> None:
    """Five products: scores, dP, dv, dk and dq."""
    heads, seqlen_q, seqlen_kv = 2, 200, 300
    leaves = [x.requires_grad_() for x in dense(heads, seqlen_q, seqlen_kv, head_dim)]
    out = dk.attention(*leaves, causal=False, backend=SM80.name)
    with emulated(backends[SM80.name], deterministic=False):
        torch.autograd.grad(out.float().sum(), leaves)
    ran = backends[SM80.name].counts
    passes = heads * blocks(seqlen_kv, block_kv) * blocks(seqlen_q, block_q)
    assert ran["mma"] == passes * 5 * block_q * block_kv * head_dim // MMA_PRODUCTS
    assert ran["red_global"] == passes * block_q * head_dim


# ---- what must not change a result -------------------------------------------------------------
def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


def with_nan(call: Call, unseen: Tensor) -> Call:
    """unseen: (B, Skv)"""
    hidden = unseen[:, None, :, None]
    return replace(
        call,
        k=call.k.masked_fill(hidden, torch.nan),
        v=call.v.masked_fill(hidden, torch.nan),
    )


RANGES = [case for case in CASES if case.kv_start or case.kv_end]


@pytest.mark.parametrize("case", RANGES, ids=lambda case: case.name)
@on_both
def test_keys_outside_the_range_may_hold_anything(
    backends: Backends, name: str, case: Case
) -> None:
    call, index = make_call(case, BF16), torch.arange(case.seqlen_kv)
    start = torch.tensor(case.kv_start or (0,) * case.batch)[:, None]
    end = torch.tensor(case.kv_end or (case.seqlen_kv,) * case.batch)[:, None]
    dirty = with_nan(call, (index < start) | (index >= end))
    with emulated(backends[name], deterministic=True):
        assert_same(dirty.run(name), call.run(name))


@these("static_cache_rope", "window_static_cache")
@on_both
def test_keys_that_no_query_sees_may_hold_anything(
    backends: Backends, name: str, case: Case
) -> None:
    call, index = make_call(case, BF16), torch.arange(case.seqlen_kv)
    call.options.pop("kv_end", None)
    first = torch.tensor(case.query_starts())[:, None]
    unseen = index >= first + case.seqlen_q
    if case.window is not None:
        unseen |= index <= first - case.window
    with emulated(backends[name], deterministic=True):
        assert_same(with_nan(call, unseen).run(name), call.run(name))


@on_both
def test_packed_sequences_do_not_see_each_other(backends: Backends, name: str) -> None:
    call = make_call(BY_NAME["packed_full_gqa"], BF16)
    other = slice(0, 17)  # the first sequence
    dirty = replace(call, k=call.k.clone(), v=call.v.clone(), q=call.q.clone())
    for tensor in (dirty.q, dirty.k, dirty.v):
        tensor[other] = torch.nan
    with emulated(backends[name], deterministic=True):
        ours, expected = dirty.run(name), call.run(name)
    for result in ("out", "dq", "dk", "dv"):
        assert torch.equal(ours[result][17:], expected[result][17:]), result
    assert torch.equal(ours["lse"][:, 17:], expected["lse"][:, 17:])


@these("regular", "head_dim_128", "packed_rope")
@on_both
def test_schedules_do_not_change_results(backends: Backends, name: str, case: Case) -> None:
    """Deterministic calls, to the last bit."""
    call = make_call(case, BF16)
    with emulated(backends[name], deterministic=True):
        expected = call.run(name)
    for seed in (11, 12):
        with emulated(backends[name], RANDOM, seed, deterministic=True):
            assert_same(call.run(name), expected)
