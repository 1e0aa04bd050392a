"""attention_decode by the CUDA kernels on the emulated device: test_varlen_decode's calls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checker import EMULATED
from test_varlen_decode import DECODES, Decode, Setup, check_only_new_rows_changed
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from emulation.attention import SM80, EmulatedBackend, emulated
from emulation.library import LATEST, RANDOM

import drope_kernels as dk

pytestmark = pytest.mark.usefixtures("backends")

Backends = dict[str, EmulatedBackend]
BF16 = torch.bfloat16

on_both = pytest.mark.parametrize("name", EMULATED)


def check_decode(case: Decode, name: str) -> None:
    setup = Setup(case, BF16)
    before = setup.plain()
    out, lse = setup.decode(name)
    expected, expected_lse = setup.expected()
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse, atol=2e-2, rtol=2e-2)
    check_only_new_rows_changed(setup, before)


@pytest.mark.parametrize("case", DECODES, ids=lambda case: case.name)
@on_both
def test_decode(backends: Backends, name: str, case: Decode) -> None:
    if case.softcap is not None:
        with pytest.raises(ValueError, match="softcap"):
            check_decode(case, name)
        return
    check_decode(case, name)
    ((function, counts),) = backends[name].launches
    assert function == "cuda_attention_decode"
    assert counts["mma"] > 0
    assert counts["ldmatrix"] > 0
    assert counts["cp_async"] > 0


@pytest.mark.parametrize("completion", [LATEST, RANDOM], ids=["latest", "random"])
@pytest.mark.parametrize("case", DECODES[1:4] + DECODES[-4:], ids=lambda case: case.name)
def test_decode_under_other_schedules(backends: Backends, case: Decode, completion: int) -> None:
    with emulated(backends[SM80.name], completion, seed=7):
        check_decode(case, SM80.name)


@pytest.mark.parametrize(
    ("heads_q", "heads_kv", "head_dim", "length"),
    [(8, 2, 64, 700), (32, 1, 128, 300), (4, 4, 96, 130), (16, 2, 256, 290)],
)
def test_decode_over_long_rows(
    backends: Backends, heads_q: int, heads_kv: int, head_dim: int, length: int
) -> None:
    """More keys than one block takes, which are split and merged."""
    generator = torch.Generator().manual_seed(head_dim)

    def normal(num_heads: int, rows: int) -> Tensor:
        return torch.randn(2, num_heads, rows, head_dim, generator=generator).bfloat16()

    q, k, v = normal(heads_q, 1), normal(heads_kv, 1), normal(heads_kv, 1)
    caches = [normal(heads_kv, length + 5) for _ in range(2)]
    lengths = torch.tensor([length, length // 3], dtype=torch.int32)
    results = [
        dk.attention_decode(
            q,
            *(cache.clone() for cache in caches),
            k=k,
            v=v,
            cache_seqlens=lengths,
            rope=True,
            backend=name,
        )
        for name in (SM80.name, "reference")
    ]
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)
