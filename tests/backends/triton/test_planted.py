"""Errors planted in the Triton kernels' own functions: `check_case` must reject every one.

A function of a kernel is replaced wherever its name is known, so that a kernel that stops using it
fails here too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from cases import BY_NAME
from checker import INTERPRETED, check_case, peer_results, yardstick
from tolerance import MismatchError

from drope_kernels.backends.triton import launch
from drope_kernels.backends.triton.block_range import IndexRange, keys_of
from drope_kernels.backends.triton.rotary import sincos_turns
from drope_kernels.backends.triton.softmax import LN_2, finish

ROOMS = "drope_kernels.backends.triton."
FP32, BF16 = torch.float32, torch.bfloat16


# ---- rotation ----------------------------------------------------------------------------------
@triton.jit
def bf16_sincos(position, turns_hi, turns_lo):
    sin, cos = sincos_turns(position, turns_hi, turns_lo)
    return sin.to(tl.bfloat16).to(tl.float32), cos.to(tl.bfloat16).to(tl.float32)


@triton.jit
def sincos_without_residual(position, turns_hi, turns_lo):
    return sincos_turns(tl.zeros_like(position) + 1.0, position * turns_hi, turns_lo)


@triton.jit
def restore_nothing(x, position, rotary, kv_head, ROTARY_DIM, INTERLEAVED, BLOCK_DIM):
    return x


launch_constants = launch.rotary_constants


def other_pairing(rotation: Any, head_dim: int) -> dict[str, Any]:
    constants = launch_constants(rotation, head_dim)
    return {**constants, "INTERLEAVED": not constants["INTERLEAVED"]}


# ---- masks -------------------------------------------------------------------------------------
@triton.jit
def one_more_key_behind(sequence, mask, query):
    keys = keys_of(sequence, mask, query)
    return IndexRange(tl.maximum(keys.begin - 1, sequence.kv_begin), keys.end)


@triton.jit
def one_more_key_ahead(sequence, mask, query):
    keys = keys_of(sequence, mask, query)
    return IndexRange(keys.begin, tl.minimum(keys.end + 1, sequence.kv_end))


# ---- softmax -----------------------------------------------------------------------------------
@triton.jit
def finish_in_base_2(softmax):
    inverse, lse = finish(softmax)
    return inverse, lse / LN_2


@dataclass(frozen=True)
class Planted:
    """What takes the place of which name, and the case that must reveal it."""

    case: str
    name: str
    broken: Callable[..., Any] | tl.constexpr
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16)


PLANTED = {
    "bf16_cos_sin": Planted("rope_without_rounding", "sincos_turns", bf16_sincos),
    "float32_angles": Planted("rope_million", "sincos_turns", sincos_without_residual),
    "wrong_pairing": Planted("rope", "rotary_constants", other_pairing),
    "no_rotation_back": Planted("rope", "restore", restore_nothing),
    "no_rotation_back_pairs": Planted("rope_interleaved", "restore", restore_nothing),
    "window_one_wider": Planted("window_16", "keys_of", one_more_key_behind),
    "causal_one_more_key": Planted("regular", "keys_of", one_more_key_ahead),
    "scale_without_log2e": Planted("regular", "LOG2_E", tl.constexpr(1.0)),
    "lse_in_base_2": Planted("regular", "finish", finish_in_base_2),
}
EXPERIMENTS = [
    pytest.param(planted, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, planted in PLANTED.items()
    for dtype in planted.dtypes
]


@pytest.mark.parametrize(("planted", "dtype"), EXPERIMENTS)
def test_planted_error_is_caught(
    planted: Planted, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME[planted.case]
    yardstick(case.name, dtype)
    peer_results(case.name, dtype)
    check_case(BY_NAME["length_1"], dtype, INTERPRETED)  # imports every room
    rooms = [room for name, room in sys.modules.items() if name.startswith(ROOMS)]
    users = [room for room in rooms if hasattr(room, planted.name)]
    assert users, f"no kernel knows {planted.name}"
    for room in users:
        monkeypatch.setattr(room, planted.name, planted.broken)
    with pytest.raises(MismatchError):
        check_case(case, dtype, INTERPRETED)
