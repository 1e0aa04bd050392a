"""Peers with MKL's AVX-512 path forced on: `pytest bench/bench_mkl_avx512.py`."""

from __future__ import annotations

import pytest

from . import mkl_avx512
from .cases import BenchCase
from .conftest import case_ids
from .timing import Samples

CASES = [
    BenchCase(dtype, head_dim, seqlen, backward=backward)
    for backward in (False, True)
    for dtype in ("fp32", "bf16")
    for head_dim in (64, 128)
    for seqlen in (1024, 4096)
]


@pytest.fixture(scope="module")
def forced_rows(tmp_path_factory):
    reason = mkl_avx512.unavailable()
    if reason:
        pytest.skip(f"MKL's AVX-512 path cannot be forced here: {reason}")
    return mkl_avx512.run_forced(CASES, tmp_path_factory.mktemp("mkl"))


@pytest.mark.parametrize("contender", ["drope_kernels", "sdpa"])
@pytest.mark.parametrize("case", CASES, ids=case_ids)
def test_against_forced_mkl(case, contender, forced_rows, replay):
    row = dict(forced_rows[f"{case.name}/{contender}"])
    samples = Samples(row.pop("seconds"))
    replay(row | {"case": f"mkl-avx512-{case.name}"}, samples)
