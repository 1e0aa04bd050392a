"""Errors planted in the sources of the tile kernels: each must be rejected by `check_case`."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import planted_tiles
import pytest
import torch
from cases import BY_NAME
from checker import check_case
from growing_rows import check_growing_rows
from planted_tiles import GROWING, PLANTED

from drope_kernels import _C
from drope_kernels.backends import cpu
from drope_kernels.call import repeat

pytestmark = pytest.mark.skipif(
    "avx2" not in _C.cpu_isas(), reason="the emulated tiles are built for AVX2 here"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return planted_tiles.build(tmp_path_factory.mktemp("planted_tiles"))


@pytest.fixture
def backend(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The CPU backend on those kernels; calls are not repeated past it."""
    monkeypatch.setattr(cpu, "_C", kernels)
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    monkeypatch.setattr(cpu, "repeated", lambda inputs: None)
    repeat.forget_all()
    yield kernels
    kernels.plant(0)
    repeat.forget_all()


def check(name: str) -> None:
    if name == GROWING:
        check_growing_rows()
    else:
        check_case(BY_NAME[name], torch.bfloat16, "cpu")


@pytest.mark.parametrize("name", sorted({planted.case for planted in PLANTED}))
def test_without_an_error_the_cases_pass(backend: ModuleType, name: str) -> None:
    check(name)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_planted_error_is_caught(backend: ModuleType, planted: planted_tiles.Planted) -> None:
    backend.plant(PLANTED.index(planted) + 1)
    with pytest.raises(AssertionError):
        check(planted.case)
