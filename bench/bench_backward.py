"""Forward + backward throughput against its peers: `pytest bench/bench_backward.py`."""

from __future__ import annotations

import pytest

from .cases import grid
from .conftest import case_ids
from .measure import measure
from .peers import contender_names

PAIRS = [(c, name) for c in grid(backward=True) for name in contender_names(c)]


@pytest.mark.parametrize(("case", "contender"), PAIRS, ids=case_ids)
def test_backward(case, contender, replay):
    measured = measure(case)
    replay(measured.row(contender), measured.samples[contender])
