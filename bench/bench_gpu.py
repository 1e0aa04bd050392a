"""Our CUDA and Triton kernels and the peers on the GPU: `pytest bench/bench_gpu.py`.

Without a GPU each case is reported as not measured.
"""

from __future__ import annotations

import functools

import pytest
import torch
from gpu_check.bench import is_ours

import drope_kernels
from bench.gpu import jobs as bench_jobs
from bench.gpu.accelerator import Gpu
from bench.gpu.cases import GROUPS, GpuCase

from .conftest import CEILINGS, GPU_ASKED, GPU_ROWS

CASES = [(group, case) for group, cases in GROUPS.items() for case in cases]


def unavailable() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if not {"cuda", "triton"} & set(drope_kernels.available_backends()):
        return "this build of drope_kernels has no CUDA kernels, and Triton cannot run"
    return None


@functools.cache
def gpu() -> Gpu:
    return Gpu()


@pytest.mark.parametrize(("group", "case"), CASES, ids=lambda x: getattr(x, "label", x))
def test_gpu(group: str, case: GpuCase, request: pytest.FixtureRequest) -> None:
    stash = request.config.stash
    stash[GPU_ASKED] = True
    reason = unavailable()
    if reason is not None:
        pytest.skip(f"not measured: {reason}")
    if stash[CEILINGS] is None:
        stash[CEILINGS] = bench_jobs.ceilings(gpu())
    rows = bench_jobs.measure(case, gpu(), flex=group == "flex")
    stash[GPU_ROWS] += rows
    torch.cuda.empty_cache()
    wrong = [row for row in rows if is_ours(row) and "error" in row]
    assert not wrong, [row["error"] for row in wrong]
