"""For every test: one thread, unwritten memory is NaN, Triton's kernels are interpreted."""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any of ours is
# Tests fill the cores by processes (`pytest -n`); those about threads ask for them. Read by torch
# when it is imported, here and in the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import interpreter
import interpreter_speed
import pytest
import torch
from checker import EMULATED, INTERPRETED

from drope_kernels.backends.triton import TritonBackend
from drope_kernels.call import dispatch

if TYPE_CHECKING:
    from emulation.attention import EmulatedBackend


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "plain_memory: leave uninitialised memory as the allocator gives it"
    )
    interpreter.mend()
    interpreter_speed.hasten()
    torch.set_num_threads(1)
    dispatch.register(TritonBackend("cpu", name=INTERPRETED))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What the imports made stays for good; to look at all of it again and again took up to a tenth
    of a file's time.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2 --dist loadscope`, as `make test` runs it."""
    from workers import Groups

    return Groups(config, log) if config.getoption("dist") == "loadscope" else None


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products this small take a hundred times as long when two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated_backends() -> dict[str, EmulatedBackend]:
    """The CUDA kernels on emulated devices, built once: by the names of the backends."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches stacks in x86-64 assembly")
    from emulation.attention import SM80, SM86, SM90A, build_module, load_backends

    return {one.NAME: one for one in load_backends(build_module(), SM80, SM86, SM90A)}


@pytest.fixture
def backends(emulated_backends: dict[str, EmulatedBackend]) -> Iterator[dict[str, EmulatedBackend]]:
    """Calls may ask for the emulated backends; their lists of launches are empty."""
    from emulation.attention import registered

    for one in emulated_backends.values():
        one.launches.clear()
    with registered(*emulated_backends.values()):
        yield emulated_backends


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name that a test is parametrised with (indirect); emulated ones are ready for calls."""
    name: str = request.param
    if name in EMULATED:
        request.getfixturevalue("backends")
    return name
