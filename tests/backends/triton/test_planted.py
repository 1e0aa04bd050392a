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
from torch import Tensor

import drope_kernels as dk
from drope_kernels.backends.triton import launch
from drope_kernels.backends.triton.block_range import IndexRange, keys_of
from drope_kernels.backends.triton.delta import QueryTerms
from drope_kernels.backends.triton.rotary import sincos_turns
from drope_kernels.backends.triton.softmax import LN_2, LOG2_E, SoftmaxState, finish
from drope_kernels.backends.triton.softmax_backward import load_terms

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
def finish_in_base_2(softmax, natural_scale):
    state = finish(softmax, natural_scale)
    return SoftmaxState(state.inverse, state.row_max, state.log2_sum, state.lse / LN_2)


@triton.jit
def terms_of_lse(
    terms, terms_tma, scale, shape, sequence, head, first, is_query, BLOCK_Q: tl.constexpr
):
    """One number a row, its last bits lost where scores are huge."""
    both = load_terms(terms, terms_tma, scale, shape, sequence, head, first, is_query, BLOCK_Q)
    lse_log2 = both.scale * LOG2_E * both.row_max + both.log2_sum
    return QueryTerms(tl.zeros_like(lse_log2), lse_log2, both.minus_delta, both.scale)


@triton.jit
def terms_without_sum(
    terms, terms_tma, scale, shape, sequence, head, first, is_query, BLOCK_Q: tl.constexpr
):
    both = load_terms(terms, terms_tma, scale, shape, sequence, head, first, is_query, BLOCK_Q)
    hidden = tl.where(both.log2_sum == float("inf"), both.log2_sum, 0.0)
    return QueryTerms(both.row_max, hidden, both.minus_delta, both.scale)


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
    "probabilities_without_sum": Planted("regular", "load_terms", terms_without_sum),
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
    plant(monkeypatch, planted.name, planted.broken)
    with pytest.raises(MismatchError):
        check_case(case, dtype, INTERPRETED)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, broken: object) -> None:
    rooms = [room for path, room in sys.modules.items() if path.startswith(ROOMS)]
    users = [room for room in rooms if hasattr(room, name)]
    assert users, f"no kernel knows {name}"
    for room in users:
        monkeypatch.setattr(room, name, broken)


def grad_values() -> tuple[Tensor, Tensor]:
    """dv and what it should be, at scores of -4e6: whole numbers, so that all compute the same."""
    generator = torch.Generator().manual_seed(0)
    q = torch.ones(1, 1, 16, 16)
    k = torch.randint(-1_000_003, -999_996, q.shape, generator=generator).float()
    v, grad_out = torch.randn(2, *q.shape, generator=generator)
    v.requires_grad_()
    out = dk.attention(q, k, v, causal=False, scale=0.25, backend=INTERPRETED)
    p = (0.25 * (q.double() @ k.double().mT)).softmax(-1)
    return torch.autograd.grad(out, v, grad_out)[0], (p.mT @ grad_out.double()).float()


def test_one_number_a_row_is_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(*grad_values(), rtol=1e-5, atol=1e-5)
    plant(monkeypatch, "load_terms", terms_of_lse)
    grad_v, expected = grad_values()
    assert (grad_v - expected).abs().max() > 0.01
