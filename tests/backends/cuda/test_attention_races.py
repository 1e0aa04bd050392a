"""Schedules and planted bugs: the emulated CUDA kernels have no race, and one would be seen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import torch
from emulation.attention import (
    SM80,
    SM90A,
    EmulatedBackend,
    build_module,
    emulated,
    load_backends,
    registered,
)
from emulation.library import AT_ISSUE, LATEST, RANDOM
from emulation.planted_attention import BUGS, AttentionBug
from torch import Tensor

import drope_kernels as dk

Backends = dict[str, EmulatedBackend]

COMPLETIONS = {"at_issue": AT_ISSUE, "latest": LATEST, "random": RANDOM}
# Of an emulated device with one processor, so that persistent blocks work on every tile.
# heads of q, of k and v, queries, keys, causal
SHAPES = (
    (3, 1, 200, 700, False),
    (4, 2, 200, 660, True),
    (6, 1, 70, 700, True),
    (2, 2, 400, 400, True),
)


def random_heads(heads: int, rows: int, head_dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, rows, head_dim, generator=generator).bfloat16()


def run(call: str, shape: int, backend: str, *, rotates: bool, head_dim: int = 64) -> list[Tensor]:
    """Results of attention, of its gradient, or of a decode, over one of SHAPES."""
    heads_q, heads_kv, seqlen_q, seqlen_kv, causal = SHAPES[shape]
    q = random_heads(heads_q, seqlen_q, head_dim, 1)
    k, v = (random_heads(heads_kv, seqlen_kv, head_dim, seed) for seed in (2, 3))
    if call == "decode":
        lengths = torch.tensor([seqlen_kv - 1], dtype=torch.int32)
        caches, new = (k, v), {"k": k[:, :, :1], "v": v[:, :, :1]}
        options = {"cache_seqlens": lengths, "rope": rotates, "backend": backend}
        return [dk.attention_decode(q[:, :, :1], *caches, **new, **options)]
    leaves = [x.requires_grad_(call == "backward") for x in (q, k, v)]
    out, lse = dk.attention(*leaves, causal=causal, rope=rotates, return_lse=True, backend=backend)
    if call == "forward":
        return [out, lse]
    return [*torch.autograd.grad(out, leaves, random_heads(heads_q, seqlen_q, head_dim, 4))]


@pytest.fixture(autouse=True)
def one_processor(backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in backends.values():
        architecture = replace(backend.architecture, num_sms=1)
        monkeypatch.setattr(backend, "architecture", architecture)


# ---- the kernels as they are -------------------------------------------------------------------
CALLS = ("forward", "backward", "decode")


def check_schedule(backends: Backends, call: str, seed: int, head_dim: int) -> None:
    """Of every kernel of the call, with and without rotation, deterministic or not: to the last
    bit, as emulated blocks run in one order.
    """
    deterministic = seed % 2 == 0
    has_two = call == "forward" and head_dim <= 128
    for name in (SM80.name, SM90A.name) if has_two else (SM80.name,):
        for shape in range(len(SHAPES)) if head_dim < 256 else (2,):
            rotates = (seed + shape) % 2 == 1
            settings = {"rotates": rotates, "head_dim": head_dim}
            with emulated(backends[name], deterministic=deterministic):
                expected = run(call, shape, name, **settings)
            with emulated(backends[name], RANDOM, seed, deterministic=deterministic):
                ours = run(call, shape, name, **settings)
            for got, want in zip(ours, expected, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("call", CALLS)
def test_attention_under_random_schedules(backends: Backends, call: str) -> None:
    check_schedule(backends, call, 1, 64)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("call", CALLS)
def test_attention_under_many_schedules(
    backends: Backends, call: str, head_dim: int, seed: int
) -> None:
    check_schedule(backends, call, seed, head_dim)


# ---- planted bugs ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def planted() -> dict[str, Backends]:
    """Bug's name -> backends of a module that holds it."""
    bugs = [bug for bug in BUGS if bug.has_its_place()]
    with ThreadPoolExecutor(max_workers=2) as pool:
        paths = pool.map(lambda bug: build_module(bug.planted(), bug.kernels()), bugs)
    devices = [replace(one, num_sms=1) for one in (SM80, SM90A)]
    return {
        bug.name: {one.NAME: one for one in load_backends(path, *devices)}
        for bug, path in zip(bugs, paths, strict=True)
    }


@cache
def expected_results(call: str, shape: int, backend: str, *, rotates: bool) -> list[Tensor]:
    return run(call, shape, backend, rotates=rotates)


def outcome(bug: AttentionBug, shape: int, backend: EmulatedBackend) -> tuple[str, int]:
    """The emulator's message, empty when there was none, and the number of wrong results."""
    expected = expected_results(bug.call, shape, SM80.name, rotates=bug.rotates)
    with registered(backend):
        try:
            ours = run(bug.call, shape, backend.NAME, rotates=bug.rotates)
        except RuntimeError as error:
            return str(error), 0
    close = {"atol": 3e-2, "rtol": 3e-2}
    return "", sum(not torch.allclose(a, b, **close) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("completion", COMPLETIONS.values(), ids=COMPLETIONS.keys())
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_planted_bug_is_caught(
    backends: Backends, planted: dict[str, Backends], bug: AttentionBug, completion: int
) -> None:
    assert bug.has_its_place(), "the kernel has changed: plant the bug anew"
    backend = planted[bug.name][bug.architecture]
    for shape in bug.shapes:
        expected_results(bug.call, shape, SM80.name, rotates=bug.rotates)
        with emulated(backend, completion, seed=5):
            said, num_wrong = outcome(bug, shape, backend)
        assert said or num_wrong > 0, SHAPES[shape]
        assert bug.message in said
