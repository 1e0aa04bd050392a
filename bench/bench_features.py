"""What a feature costs over the plain call: rope, row scale, window, padding, each interleaved."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import drope_kernels

from .cases import BenchCase, tensors
from .conftest import case_ids
from .gate import run_gate
from .measure import Measured, torch_threads
from .timing import clock_for, interleave

FEATURES = ("plain", "rope", "row_scale", "window", "padding")
CASES = [BenchCase(t, d, s) for t in ("fp32", "bf16") for d in (64, 128) for s in (1024, 4096)]


def variants(case: BenchCase) -> dict[str, Callable[[], object]]:
    """Calls that do the same amount of attention: the window and the padding cut nothing off."""
    q, k, v = tensors(case)
    rows = torch.full((1, case.num_heads_q, case.seqlen), case.head_dim**-0.5)
    ends = torch.tensor([case.seqlen], dtype=torch.int32)
    attention = drope_kernels.attention
    return {
        "plain": lambda: attention(q, k, v),
        "rope": lambda: attention(q, k, v, rope=True),
        "row_scale": lambda: attention(q, k, v, scale=rows),
        "window": lambda: attention(q, k, v, window=case.seqlen),
        "padding": lambda: attention(q, k, v, kv_end=ends),
    }


@functools.cache
def measure_features(case: BenchCase) -> Measured:
    with torch_threads(1):
        gate = run_gate(case)
        gate.check(case)
        samples = interleave(variants(case), clock=clock_for(1), budget=3.0)
    samples["drope_kernels"] = samples["plain"]  # what the others are compared with
    return Measured(case, gate, samples, dict.fromkeys(FEATURES), float("nan"))


@pytest.mark.parametrize("case", CASES, ids=case_ids)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_cost(case, feature, replay):
    measured = measure_features(case)
    row = measured.row(feature) | {"case": f"features-{case.name}"}
    replay(row, measured.samples[feature])
