"""The emulator's own rules about global memory and launches."""

from __future__ import annotations

import platform

import numpy as np
import pytest
from probes.probe import Run

from emulation.library import AT_ISSUE, LATEST, RANDOM, EmulationError, Emulator, build

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator switches stacks in x86-64 assembly"
)

INVALID_VALUE, INVALID_CONFIGURATION = "cudaErrorInvalidValue", "cudaErrorInvalidConfiguration"


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator.load(build())


@pytest.mark.parametrize("completion", [AT_ISSUE, LATEST, RANDOM])
def test_vectors_of_16_bytes(emulator: Emulator, completion: int) -> None:
    values = np.arange(128, dtype=np.float32).reshape(32, 4)
    emulator.configure(completion)
    out = emulator.call("emulation_vector", Run(values, np.zeros_like(values), [0]))
    np.testing.assert_array_equal(out, values.reshape(16, 2, 4)[:, ::-1].reshape(32, 4))


@pytest.mark.parametrize(
    ("offset", "message"), [(-16, "no allocation holds"), (4, "16 bytes is not aligned")]
)
def test_vectors_lie_where_they_may(emulator: Emulator, offset: int, message: str) -> None:
    values = np.zeros((32, 4), np.float32)
    emulator.configure(AT_ISSUE)
    with pytest.raises(EmulationError, match=message):
        emulator.call("emulation_vector", Run(values, values, [offset]))


def test_memory_of_the_host_is_not_the_devices(emulator: Emulator) -> None:
    values = np.zeros(4, np.float32)
    emulator.configure(AT_ISSUE)
    with pytest.raises(EmulationError, match="an ordinary load touches 4 bytes"):
        emulator.call("emulation_host_memory", Run(values, values, []))
    address = values.ctypes.data
    emulator.library.emulation_lend(address, values.nbytes)
    try:
        emulator.call("emulation_host_memory", Run(values, values, []))
    finally:
        emulator.library.emulation_take_back(address)


def test_reductions_atomics_and_a_grid_of_three_dimensions(emulator: Emulator) -> None:
    values = np.arange(1, 33, dtype=np.float32)
    emulator.configure(RANDOM, seed=3)
    out = emulator.call("emulation_reduce", Run(values, np.zeros(80, np.float32), [3, 2, 4]))
    blocks, total = 24, 24 * values.sum()
    np.testing.assert_array_equal(out[:8], total * np.array([1, 0, 1, 2, 1, 1, 1, 1]))
    assert out[8] == blocks * 32
    assert out[9] == blocks * 32 - 1
    np.testing.assert_array_equal(out[16:48], np.maximum(values - 1, 1))
    np.testing.assert_array_equal(out[48:80], np.r_[values[3:], values[-3:]])
    assert emulator.counts()["red_global"] == blocks * 32 * 3


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "is_allowed", "error"),
    [
        (32, 49152, 0, ""),
        (32, 49153, 0, INVALID_VALUE),
        (32, 49153, 1, ""),
        (32, 166912, 1, ""),
        (32, 166913, 1, INVALID_VALUE),
        (1024, 0, 0, ""),
        (1025, 0, 0, INVALID_CONFIGURATION),
        (0, 0, 0, INVALID_CONFIGURATION),
    ],
)
def test_a_launch_has_the_limits_of_its_device(
    emulator: Emulator, threads: int, shared_bytes: int, is_allowed: int, error: str
) -> None:
    out = np.zeros(1, np.float32)
    run = Run(out, out, [threads, shared_bytes, is_allowed])
    emulator.configure(AT_ISSUE)
    emulator.set_device((8, 0), num_sms=1, shared_bytes=166912)
    if not error:
        emulator.call("emulation_launch", run)
        return
    with pytest.raises(RuntimeError, match=error):
        emulator.call("emulation_launch", run)
