"""What holds for every test: unwritten memory is NaN, and cases run or say why not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "plain_memory: leave uninitialised memory as the allocator gives it"
    )


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills what torch.empty and its relatives return with NaN (integers: their largest value).

    torch does this itself in deterministic mode, whoever allocates. An element that a backend
    forgets to write then fails every comparison.
    """
    if request.node.get_closest_marker("plain_memory"):
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
