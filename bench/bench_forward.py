"""Forward throughput, one call at a time against its peers: `pytest bench/bench_forward.py`."""

from __future__ import annotations

import pytest

from .cases import grid
from .conftest import case_ids
from .measure import measure
from .peers import contender_names

PAIRS = [(c, name) for c in grid(backward=False) for name in contender_names(c)]


@pytest.mark.parametrize(("case", "contender"), PAIRS, ids=case_ids)
def test_forward(case, contender, replay):
    measured = measure(case)
    replay(measured.row(contender), measured.samples[contender])
