"""Random combinations of shapes and features: CPU and Triton kernels against the reference.

The named cases hold one or two features each; here any of them meet. Examples are drawn the same
way in every run (derandomized), so that a failure is a change of ours; `slow` draws many more.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from calls import make_call
from cases import Case, RopeCase
from checker import INTERPRETED, check_drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KINDS = ("plain", "yarn", "table", "per_head")
BOUNDED = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


@st.composite
def ropes(draw: st.DrawFn, head_dim: int) -> RopeCase:
    pairs = draw(st.integers(1, head_dim // 2))
    return RopeCase(
        draw(st.sampled_from(KINDS)),
        theta=draw(st.sampled_from((100.0, 10_000.0, 500_000.0))),
        dim=2 * pairs,
        interleaved=draw(st.booleans()),
        attention_factor=draw(st.sampled_from((1.0, 0.8, 1.3))),
    )


@st.composite
def ranges(draw: st.DrawFn, batch: int, seqlen_kv: int) -> tuple[tuple[int, ...], ...]:
    """kv_start and kv_end, empty ranges and kv_start > kv_end included."""
    ends = st.tuples(*[st.integers(0, seqlen_kv)] * batch)
    return draw(ends), draw(ends)


@st.composite
def cases(draw: st.DrawFn, most_queries: int = 90) -> Case:
    batch = draw(st.integers(1, 3))
    num_heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    seqlen_q = draw(st.integers(1, most_queries))
    seqlen_kv = draw(st.just(seqlen_q) | st.integers(1, 140))
    head_dim = draw(st.sampled_from((2, 8, 16, 20, 32, 40, 64, 72, 128)))
    kv_start, kv_end = None, None
    if draw(st.booleans()):
        kv_start, kv_end = draw(ranges(batch, seqlen_kv))
    starts = st.integers(-20, seqlen_kv + 20)
    layouts = ("bhsd", "bshd", "expanded_heads")
    if seqlen_q == seqlen_kv:
        layouts = ("fused", *layouts)
    return Case(
        "drawn",
        batch=batch,
        num_heads_q=num_heads_kv * group,
        num_heads_kv=num_heads_kv,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        head_dim=head_dim,
        head_dim_v=draw(st.sampled_from((None, 5, 24, 48))),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 60)),
        softcap=draw(st.none() | st.sampled_from((1.5, 20.0))),
        rope=draw(st.none() | ropes(head_dim)),
        scale=draw(st.sampled_from(("default", "float", "row"))),
        q_start=draw(st.none() | starts | st.tuples(*[starts] * batch)),
        kv_start=kv_start,
        kv_end=kv_end,
        layout=draw(st.sampled_from(layouts)),
        lse_grad=draw(st.booleans()),
    )


@settings(max_examples=50, **BOUNDED)
@given(case=cases())
def test_cpu_equals_reference(case: Case) -> None:
    check_drawn(make_call(case, torch.float32), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=500, **BOUNDED)
@given(case=cases())
def test_cpu_equals_reference_at_length(dtype: torch.dtype, case: Case) -> None:
    check_drawn(make_call(case, dtype), "cpu")


@settings(max_examples=12, **BOUNDED)
@given(case=cases())
def test_triton_equals_reference(case: Case) -> None:
    check_drawn(make_call(case, torch.float32), INTERPRETED)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=100, **BOUNDED)
@given(case=cases())
def test_triton_equals_reference_at_length(dtype: torch.dtype, case: Case) -> None:
    check_drawn(make_call(case, dtype), INTERPRETED)


@settings(max_examples=50, **BOUNDED)
@given(case=cases())
def test_reference_equals_formula(case: Case) -> None:
    """The same draws against the float64 oracle, so that both backends cannot be wrong alike."""
    call = make_call(case, torch.float64)
    ours, exact = call.run("reference"), oracle.run(call)
    for name, expected in exact.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-10)
