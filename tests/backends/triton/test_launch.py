"""The launchers of the Triton backend read no values: what CUDA graphs and torch.compile rely on.

They run on tensors without values (triton_offline), on which reading one is an error, and must
not make tensors on the host either. What they start may depend on shapes only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from triton_calls import STEPS, every_call
from triton_offline import offline

ARCHITECTURES = (80, 90)
CALLS = tuple(call for step in STEPS for call in every_call(step, "bfloat16"))
SIZES = ("4x4096", "8x4096", "4x1024", "3x8192")


@cache
def launches(architecture: int) -> dict[str, Any]:
    """Every call twice, in one process."""
    again = tuple(f"{call}-4x4096" for call in CALLS)
    resized = tuple(f"{call}-{size}" for call in resizable() for size in SIZES)
    return offline("launch", architecture, *CALLS, *again, *resized)


def resizable() -> tuple[str, ...]:
    return tuple(f"{step}-bfloat16-128-{feature}" for step in STEPS for feature in STEPS[step])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_shapes_launch_the_same(architecture: int, step: str) -> None:
    calls = launches(architecture)["calls"]
    for call in CALLS:
        if call.startswith(step):
            assert calls[call], call
            assert calls[call] == calls[f"{call}-4x4096"], call


def variants(architecture: int, call: str) -> set[str]:
    """What a call of any of the sizes compiles, its own size left out."""
    calls = launches(architecture)["calls"]
    compiled = {one["kernel"] for size in SIZES for one in calls[f"{call}-{size}"]}
    return compiled - {one["kernel"] for one in calls[call]}


@pytest.mark.parametrize("call", [call for call in resizable() if call.startswith("decode")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_sizes_of_decode_compile_little(architecture: int, call: str) -> None:
    """Kernels are compiled for a kind of call, not for its size; there are few plans of splits."""
    assert len(variants(architecture, call)) <= 2


@pytest.mark.parametrize("call", [call for call in resizable() if not call.startswith("decode")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_sizes_compile_nothing(architecture: int, call: str) -> None:
    assert not variants(architecture, call)
