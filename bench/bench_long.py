"""Throughput and memory at 16384 to 131072 keys, one head: `pytest bench/bench_long.py`."""

from __future__ import annotations

import pytest

from .cases import long_grid
from .conftest import case_ids
from .measure import measure
from .peers import contender_names

PAIRS = [(c, name) for c in long_grid() for name in contender_names(c)]
GIB = 2**30


@pytest.mark.parametrize(("case", "contender"), PAIRS, ids=case_ids)
def test_long(case, contender, replay):
    measured = measure(case)
    replay(measured.row(contender), measured.samples[contender])
    if contender == "drope_kernels":
        extra = measured.memory[contender]
        assert extra is None or extra < 2 * GIB, f"{extra / GIB:.2f} GiB beyond the inputs"
