"""What Triton's compiler makes of our kernels for sm_80 and sm_90: nothing here needs a GPU.

Every configuration is compiled from the launchers' own arguments. The limits are those of design's
section 7: no local memory, tensor cores in every product of 16-bit tiles, copies that do not wait.
"""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton_calls import DTYPES, STEPS, every_call
from triton_offline import offline

ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # of a block
# How registers are dealt differs from version to version: that of the GPU machine is judged.
IS_JUDGED = triton.__version__.startswith("3.6.")
SAMPLE = {
    "forward": ("forward-bfloat16-64-causal", "forward-bfloat16-128-rope"),
    "training": ("training-bfloat16-64-rope", "training-bfloat16-128-causal"),
    "decode": ("decode-bfloat16-128-causal-1x4096", "decode-bfloat16-128-pages"),
}

on_both = pytest.mark.parametrize("architecture", ARCHITECTURES)


def may_spill(kernel: dict[str, Any]) -> bool:
    """float32: FFMA takes its operands from registers, few are left, and tensor cores do not wait.

    Gradients of half-split pairs that are no part of the padded row, such as 80 of 128 channels:
    each pair is brought together by a gather, once, behind the loop.
    """
    dtypes = {dtype for _, dtype in kernel["products"]}
    if not kernel["name"].startswith("backward"):
        return dtypes == {"f32"}
    rotary_dim, is_half_split = kernel["ROTARY_DIM"], not kernel["INTERLEAVED"]
    gathers = rotary_dim > 0 and is_half_split and kernel["BLOCK_DIM"] % rotary_dim != 0
    return gathers or dtypes == {"f32"}


def faults(kernel: dict[str, Any], architecture: int) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    count = kernel["instructions"]
    found = []
    is_judged = IS_JUDGED and not may_spill(kernel)
    if is_judged and (kernel["stack"] or count["LDL"] or count["STL"]):
        found.append(f"local memory: {kernel['stack']} bytes of stack, {count['LDL']} loads")
    if kernel["shared"] > SHARED_LIMIT[architecture]:
        found.append(f"{kernel['shared']} bytes of shared memory")
    if kernel["tma"] != (count["UTMALDG"] > 0):
        found.append(f"{count['UTMALDG']} loads by TMA")
    return found + wrong_products(kernel, architecture)


def wrong_products(kernel: dict[str, Any], architecture: int) -> list[str]:
    """16-bit tiles are multiplied by tensor cores, on sm_90 by wgmma where it has its 64 rows."""
    rows = [rows for rows, dtype in kernel["products"] if dtype in ("bf16", "f16")]
    by_wgmma = sum(architecture == 90 and one >= 64 for one in rows)
    expected = {"HGMMA": by_wgmma > 0, "HMMA": by_wgmma < len(rows)}
    counts = {name: kernel["instructions"][name] for name in expected}
    if all((counts[name] > 0) == present for name, present in expected.items()):
        return []
    return [f"{counts} for products of {rows} rows"]


def check_calls(architecture: int, wanted: tuple[str, ...], compiled: dict[str, Any]) -> None:
    labels = dict.fromkeys(
        launch["kernel"] for call in wanted for launch in compiled["calls"][call]
    )
    assert labels, "nothing was launched"
    wrong = {}
    for label in labels:
        kernel = compiled["kernels"][label]
        found = faults(kernel, architecture)
        if found:
            wrong[label] = (found, kernel)
    assert not wrong, "\n".join(f"{label}: {what}" for label, what in wrong.items())


@pytest.mark.parametrize("step", STEPS)
@on_both
def test_compiled(architecture: int, step: str) -> None:
    calls = SAMPLE[step]
    check_calls(architecture, calls, offline("compile", architecture, *calls))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
@on_both
def test_every_configuration_compiled(architecture: int, step: str, dtype: str) -> None:
    calls = every_call(step, dtype)
    check_calls(architecture, calls, offline("compile", architecture, *calls))
