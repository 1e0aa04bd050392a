"""Every backend on every named case: outputs, lse and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import oracle
import pytest
import torch
from calls import Call, make_call
from cases import BY_NAME, CASES, DENSE_CASES, Case, RopeCase
from checker import (
    BACKENDS,
    BUILT,
    DTYPES,
    INTERPRETED,
    SHARED_SCALES,
    check_case,
    run_or_skip,
)
from torch import Tensor

import drope_kernels as dk


def named(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


# --- the two yardsticks --------------------------------------------------------------------------


@named(CASES)
def test_reference_is_the_formula(case: Case) -> None:
    """The reference in float64 against the oracle, which shares no code with it."""
    call = make_call(case, torch.float64)
    ours, exact = call.run("reference"), oracle.run(call)
    # A turn is stored in 48 bits: at position 1e6 that leaves about 1e-9 of a radian.
    # The formula rounds scores of 14,000 to 2e-12, and an entry of 400 multiplies that.
    atol = 1e-7 if case.positions == "million" else 1e-9 if case.magnitude == "huge" else 1e-10
    for name, expected in exact.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=atol)


# float16 differs from bfloat16 in what overflows and in little else of an interpreted kernel.
INTERPRETED_IN_FLOAT16 = {
    "regular",
    "length_111_full",
    "head_dim_33",
    "wide_values",
    "padded_both_sides_full",
    "huge_entries",
    "softcap_rope_rows",
    "scale_per_row_rope",
    "rope_per_head_interleaved",
    "rope_attention_factor",
    "packed_rope",
}


def runs() -> Iterator[Any]:
    """Every backend, dtype and case; what the interpreter has no time for is slow."""
    for backend, dtype, case in product(BACKENDS, DTYPES, CASES):
        is_slow = backend == INTERPRETED and (
            (dtype == torch.float16 and case.name not in INTERPRETED_IN_FLOAT16)
            or (dtype == torch.bfloat16 and case.name == "length_1521")
        )
        label = f"{backend}-{str(dtype).removeprefix('torch.')}-{case.name}"
        marks = [pytest.mark.slow] if is_slow else []
        yield pytest.param(backend, dtype, case, marks=marks, id=label)


@pytest.mark.parametrize(("backend", "dtype", "case"), list(runs()))
def test_case(backend: str, dtype: torch.dtype, case: Case) -> None:
    check_case(case, dtype, backend)


def test_every_known_backend_is_tested() -> None:
    with pytest.raises(ValueError, match="backend") as caught:
        make_call(BY_NAME["length_1"], torch.float32).run("nonesuch")
    known = str(caught.value).split("one of ")[1].split(", got")[0]
    # Those of GPUs are tested under other names: emulated and interpreted.
    assert set(known.split(", ")) - {"cuda", "triton"} == set(BACKENDS)


def test_our_own_backends_are_always_there() -> None:
    """Nothing else in this suite may pass because the extension was never built."""
    assert set(BUILT) <= set(dk.available_backends())


# --- derivatives ---------------------------------------------------------------------------------

GRADCHECK = (
    Case("plain", seqlen_q=4, seqlen_kv=6, head_dim=4),
    Case("rows", seqlen_q=4, seqlen_kv=6, head_dim=4, scale="row"),
    Case("shared_scale", seqlen_q=4, seqlen_kv=6, head_dim=4, scale="call", causal=False),
    Case("rope", seqlen_q=4, seqlen_kv=4, head_dim=4, rope=RopeCase(attention_factor=1.3)),
    Case("softcap", seqlen_q=4, seqlen_kv=4, head_dim=4, softcap=1.5, scale="row"),
    Case("empty_rows", seqlen_q=6, seqlen_kv=3, head_dim=4, scale="row"),
    Case("groups", num_heads_q=4, seqlen_q=3, seqlen_kv=5, head_dim=2, window=2),
)


@named(GRADCHECK)
def test_gradients_are_derivatives(case: Case) -> None:
    """Finite differences through `attention` itself, out and lse together."""
    call = make_call(replace(case, batch=1), torch.float64)
    leaves = call.leaves()

    def outputs(*operands: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = call.outputs(dict(zip(leaves, operands, strict=True)), "reference")
        return out, lse.masked_fill(lse.isinf(), 0.0)  # -inf - -inf is no finite difference

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), atol=1e-7)


@named(tuple(case for case in CASES if case.scale in SHARED_SCALES))
@on_every_backend
def test_shared_scale_collects_the_gradients_of_its_rows(backend: str, case: Case) -> None:
    call = make_call(case, torch.float32)
    shared = run_or_skip(call, backend)
    rows = replace(call, scale=call.scale.expand(call.q.shape[:-1]).clone()).run(backend)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(shared[name], rows[name]), name
    expected = rows["dscale"].double().sum_to_size(call.scale.shape)
    bound = 1e-5 * rows["dscale"].double().abs().sum_to_size(call.scale.shape)
    assert ((shared["dscale"] - expected).abs() <= bound).all()


# --- what must not change a result ---------------------------------------------------------------


@named((BY_NAME["rope_gqa"], BY_NAME["right_padded"], BY_NAME["packed_rope"]))
@on_every_backend
def test_inference_equals_training(backend: str, case: Case) -> None:
    call = make_call(case, torch.bfloat16)
    trained = run_or_skip(call, backend)
    with torch.no_grad():
        out, lse = call.outputs(call.leaves(), backend)
    assert torch.equal(out, trained["out"])
    assert torch.equal(lse, trained["lse"])


@named((BY_NAME["rope_gqa"], BY_NAME["scale_per_row_rope"]))
@on_every_backend
def test_two_runs_are_identical(backend: str, case: Case) -> None:
    call = make_call(case, torch.float32)
    first, second = run_or_skip(call, backend), run_or_skip(call, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@named(tuple(c for c in DENSE_CASES if c.kv_start or c.kv_end))
@on_every_backend
def test_keys_outside_the_range_may_hold_anything(backend: str, case: Case) -> None:
    """A cache beyond its fill mark is uninitialised memory; NaN there must reach nothing."""
    clean = make_call(case, torch.float32)
    dirty = make_call(case, torch.float32)
    index = torch.arange(case.seqlen_kv)
    start = torch.tensor(case.kv_start or (0,) * case.batch)[:, None]
    end = torch.tensor(case.kv_end or (case.seqlen_kv,) * case.batch)[:, None]
    outside = ((index < start) | (index >= end))[:, None, :, None]
    dirty.k = dirty.k.masked_fill(outside, torch.nan)
    dirty.v = dirty.v.masked_fill(outside, torch.nan)
    expected, ours = run_or_skip(clean, backend), run_or_skip(dirty, backend)
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.parametrize("name", ["static_cache_chunk", "window_static_cache", "static_cache_rope"])
@on_every_backend
def test_keys_that_no_query_sees_may_hold_anything(backend: str, name: str) -> None:
    """Ahead of the causal mask or behind the window, without a range that says so."""
    clean, dirty = make_call(BY_NAME[name], torch.float32), make_call(BY_NAME[name], torch.float32)
    for call in (clean, dirty):
        call.options.pop("kv_end", None)
    case = clean.case
    last = torch.tensor(case.query_starts())[:, None] + case.seqlen_q - 1
    index = torch.arange(case.seqlen_kv)
    unseen = index > last
    if case.window is not None:
        unseen |= index <= last - case.seqlen_q + 1 - case.window
    dirty.k = dirty.k.masked_fill(unseen[:, None, :, None], torch.nan)
    dirty.v = dirty.v.masked_fill(unseen[:, None, :, None], torch.nan)
    expected, ours = run_or_skip(clean, backend), run_or_skip(dirty, backend)
    for result in expected:
        assert torch.equal(ours[result], expected[result]), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_backend
def test_queries_that_see_no_key_may_hold_anything(backend: str, dtype: torch.dtype) -> None:
    """The queries of padding, and the gradient that comes back for them."""
    case = replace(BY_NAME["left_padded"], scale="row")
    clean, dirty = make_call(case, dtype), make_call(case, dtype)
    assert case.kv_start is not None
    empty = torch.arange(case.seqlen_q) < torch.tensor(case.kv_start)[:, None]
    dirty.q = dirty.q.masked_fill(empty[:, None, :, None], torch.nan)
    dirty.grad_out = dirty.grad_out.masked_fill(empty[:, None, :, None], torch.nan)
    expected, ours = run_or_skip(clean, backend), run_or_skip(dirty, backend)
    for result in expected:
        assert torch.equal(ours[result], expected[result]), result


def memory_order(x: Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory."""
    return sorted(range(x.dim()), key=lambda dim: -x.stride(dim))


@pytest.mark.parametrize("layout", ["regular", "transposed", "transposed_rope", "fused_projection"])
@on_every_backend
def test_results_follow_the_memory_order_of_their_inputs(backend: str, layout: str) -> None:
    results = run_or_skip(make_call(BY_NAME[layout], torch.float32), backend)
    expected = [0, 1, 2, 3] if layout == "regular" else [0, 2, 1, 3]
    for name in ("out", "dq", "dk", "dv"):
        assert memory_order(results[name]) == expected, name


@on_every_backend
def test_empty_rows_give_zero_minus_infinity_and_no_gradient(backend: str) -> None:
    results = run_or_skip(make_call(BY_NAME["every_row_empty"], torch.float32), backend)
    assert (results["lse"] == -torch.inf).all()
    for name in ("out", "dq", "dk", "dv"):
        assert (results[name] == 0).all(), name


@on_every_backend
def test_no_queries_have_gradients_all_the_same(backend: str) -> None:
    """That of a sum arrives expanded, with strides of 0."""
    call = make_call(BY_NAME["no_queries_rope"], torch.float32)
    leaves = call.leaves()
    out, _ = call.outputs(leaves, backend)
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all((grad == 0).all() for grad in grads)


@on_every_backend
def test_gradients_of_some_inputs_only(backend: str) -> None:
    """What autograd asks for must not change what it gets."""
    call = make_call(BY_NAME["scale_per_row_rope"], torch.float32)
    expected = run_or_skip(call, backend)
    for wanted in ("q", "k", "v", "scale"):
        leaves = {name: leaf.detach() for name, leaf in call.leaves().items()}
        leaves[wanted].requires_grad_()
        out, _ = call.outputs(leaves, backend)
        (grad,) = torch.autograd.grad(out, leaves[wanted], call.grad_out)
        no_lse: Call = replace(call, grad_lse=None)
        assert torch.equal(grad, no_lse.run(backend)[f"d{wanted}"]), wanted
    assert set(expected) == {"out", "lse", "dq", "dk", "dv", "dscale"}
