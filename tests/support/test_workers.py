"""Which tests go to one worker together."""

from __future__ import annotations

from pathlib import Path

import pytest
from repository import ROOT
from workers import SPREAD, TOGETHER, group_of

GROUPS = {
    "tests/hf/test_masks.py::test_a[x-y]": "tests/hf/test_masks.py",
    "tests/gpu_check/test_jobs.py::test_a": TOGETHER,
    "tests/test_attention.py::test_case[interpreted-triton-float32-rope_gqa]": "rope_gqa",
    "tests/backends/cuda/test_attention.py::test_case[emulated-sm80-rope_gqa]": "rope_gqa",
    "tests/call/test_ops.py::test_a[cpu-x]": "tests/call/test_ops.py::test_a",
}


@pytest.mark.parametrize("nodeid", GROUPS)
def test_groups(nodeid: str) -> None:
    assert group_of(nodeid) == GROUPS[nodeid]


def test_the_files_are_there() -> None:
    for name in (*SPREAD, TOGETHER):
        assert Path(ROOT, name).exists(), name


@pytest.mark.parametrize("file", sorted(SPREAD))
def test_what_is_spread_prepares_nothing_of_its_own(file: str) -> None:
    assert 'scope="module"' not in Path(ROOT, file).read_text()
