"""Holds one backend to one case: outputs, lse and every gradient against the float64 yardstick."""

from __future__ import annotations

import functools

import oracle
import peer
import pytest
import torch
from calls import Call, make_call
from cases import BY_NAME, Case
from magnitudes import BY_CHANNELS, large_channels
from tolerance import check_tensor
from torch import Tensor

import drope_kernels as dk

BUILT = ("reference", "cpu")  # part of every build
INTERPRETED = "interpreted-triton"  # registered by conftest, for CPU tensors
BACKENDS = (*BUILT, INTERPRETED)
EMULATED = ("emulated-sm80", "emulated-sm90a")  # the CUDA kernels: conftest's `backends`
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFUSAL = "backend: expected one that can serve this call"

CANCELLING = ("dq", "dk", "dscale")  # 0 where a query sees a single key: dS = P (dP - delta)

# A scale that is shared by several rows sums their gradients, too few numbers to compare by rms;
# test_attention holds those sums to the gradient of the same scale written out in rows.
SHARED_SCALES = ("call", "head", "batch", "query")


@functools.cache
def yardstick(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The reference backend in float64 on the values of `dtype`."""
    return make_call(BY_NAME[name], dtype).to(torch.float64).run("reference")


@functools.cache
def peer_results(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return oracle.run(make_call(BY_NAME[name], dtype), peer.attend)


def check_case(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Raises tolerance.MismatchError if a result of the backend is further off than allowed."""
    call = make_call(case, dtype)
    compare(
        call,
        run_or_skip(call, backend),
        yardstick(case.name, dtype),
        peer_results(case.name, dtype),
    )


def check_drawn(call: Call, backend: str) -> None:
    """`check_case` for a call drawn at random, whose tensors may have a single element.

    One rounding of the terms of each sum is allowed on top: a peer may be lucky in a small tensor.
    """
    ref = call.to(torch.float64).run("reference")
    peers = oracle.run(call, peer.attend)
    compare(call, call.run(backend), ref, peers, allowances=term_roundings(call))


def compare(
    call: Call,
    ours: dict[str, Tensor],
    ref: dict[str, Tensor],
    peers: dict[str, Tensor],
    *,
    allowances: dict[str, float] | None = None,
) -> None:
    bounds = term_roundings(call)
    for name in ref:
        if name == "dscale" and call.case.scale in SHARED_SCALES:
            assert ours[name].isfinite().all(), f"dscale: not finite, got {ours[name]}"
            continue
        bound = bounds.get(name, 0.0) if name in CANCELLING else 0.0
        unit = lse_unit(call) if name == "lse" else 0.0
        allowance = (allowances or {}).get(name, 0.0)
        sizes = {"cancellation": bound, "unit": unit, "allowance": allowance}
        if call.case.magnitude in BY_CHANNELS and name in ("dq", "dk"):
            check_by_channels(call, name, [x[name] for x in (ours, peers, ref)])
        else:
            check_tensor(name, ours[name], peers[name], ref[name], **sizes)


def check_by_channels(call: Call, name: str, results: list[Tensor]) -> None:
    """Large channels apart from the others, whose errors theirs would hide.

    In a large channel that all keys share dq is dS's sum over keys, 0, times its entries.
    """
    factors = call.k if name == "dq" else call.q
    is_large = large_channels(factors)
    for channels, where in ((is_large, "large"), (~is_large, "small")):
        ours, peers, ref = (x[..., channels] for x in results)
        bound = term_roundings(call)[name] if where == "large" else 0.0
        check_tensor(f"{name} ({where} channels)", ours, peers, ref, allowance=bound)


def lse_unit(call: Call) -> float:
    """How large lse counts as in its tolerance: an error of lse is a relative one of row sums.

    float32 calls: 1, so 1e-6 is allowed. With 16-bit probabilities exp needs no more than 1e-5,
    which is 1/200 of a bf16 rounding and 1/50 of a float16 one.
    """
    return 1.0 if call.q.dtype == torch.float32 else 10.0


def term_roundings(call: Call) -> dict[str, float]:
    """One rounding of the terms of each result; dP's, in those that vanish where it cancels."""
    if min(call.q.numel(), call.k.numel(), call.v.numel()) == 0:
        return {}
    eps = torch.finfo(call.q.dtype).eps

    def longest(x: Tensor) -> float:
        return float(x.double().norm(dim=-1).max())

    score_grad = eps * longest(call.grad_out) * longest(call.v)
    scale = call.scale if call.scale is not None else call.case.head_dim**-0.5
    largest_scale = float(torch.as_tensor(scale).max())
    factor = 1.0 if call.case.rope is None else max(1.0, call.case.rope.attention_factor) ** 2
    return {
        "out": eps * float(call.v.abs().max()),
        "dv": eps * float(call.grad_out.abs().max()) * call.q.shape[-2],
        "dq": score_grad * largest_scale * factor * float(call.k.abs().max()),
        "dk": score_grad * largest_scale * factor * float(call.q.abs().max()) * call.q.shape[-2],
        "dscale": score_grad * factor * longest(call.q) * longest(call.k),
    }


def run_or_skip(call: Call, backend: str) -> dict[str, Tensor]:
    """The backend's results; skipped with the backend's own sentence when it refuses the call.

    A backend that is part of every build may refuse a call but not be missing: that is a failure.
    The Triton kernels serve everything: of them any refusal is one.
    """
    try:
        return call.run(backend)
    except ValueError as error:
        is_missing = backend in BUILT and backend not in dk.available_backends()
        if not str(error).startswith(REFUSAL) or is_missing or backend == INTERPRETED:
            raise
        pytest.skip(str(error))
