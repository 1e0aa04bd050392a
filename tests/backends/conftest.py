"""What the tests of the CPU kernels share: an instruction set, and threads of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from drope_kernels import _C


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa("")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
