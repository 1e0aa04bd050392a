"""What the tests of the CPU kernels share: an instruction set, and threads of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from drope_kernels import _C

TILES = ("amx", "amx-emulated")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tiles multiply bfloat16: with other types they are lanes, which are tested as themselves."""
    kept = []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        dtype = parameters.get("dtype", torch.bfloat16)
        if parameters.get("isa") not in TILES or dtype == torch.bfloat16:
            kept.append(item)
    items[:] = kept


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
