"""Few queries without gradient read keys in place, with every option that a call can have."""

from __future__ import annotations

import oracle
import peer
import pytest
import torch
from calls import Call, make_call
from cases import BY_NAME, Case
from checker import compare, peer_results, term_roundings, yardstick
from hypothesis import given, settings
from test_attention_drawn import BOUNDED, cases
from torch import Tensor

from drope_kernels import attention

MOST = 12  # more queries go to kernels that pack keys
FEW = [
    *("length_1", "single_query", "single_key", "window_static_cache"),
    *("q_start_beyond_keys", "rope_single_query"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def without_gradient(call: Call) -> dict[str, Tensor]:
    with torch.no_grad():
        out, lse = call.outputs(call.leaves(), "cpu")
    return {"out": out, "lse": lse}


def results_of(full: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full[name] for name in ("out", "lse")}


def test_the_cases_are_all_that_have_few_queries() -> None:
    few = [n for n, case in BY_NAME.items() if not case.packed and 0 < case.seqlen_q <= MOST]
    assert few == FEW


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEW)
def test_named_case(isa: str, name: str, dtype: torch.dtype) -> None:
    ref, peers = (results_of(f(name, dtype)) for f in (yardstick, peer_results))
    call = make_call(BY_NAME[name], dtype)
    compare(call, without_gradient(call), ref, peers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, **BOUNDED)
@given(case=cases(most_queries=MOST))
def test_drawn(isa: str, dtype: torch.dtype, case: Case) -> None:
    call = make_call(case, dtype)
    ref = results_of(call.to(torch.float64).run("reference"))
    peers = results_of(oracle.run(call, peer.attend))
    compare(call, without_gradient(call), ref, peers, allowances=term_roundings(call))


def test_keys_outside_the_range_may_be_nan(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 16, generator=generator)
    k, v = (torch.randn(2, 2, 200, 16, generator=generator) for _ in range(2))
    ranges = {
        "kv_start": torch.tensor([70, 5], dtype=torch.int32),
        "kv_end": torch.tensor([150, 130], dtype=torch.int32),
    }
    expected = attention(q, k, v, causal=False, **ranges)
    for row, (begin, end) in enumerate(zip(*ranges.values(), strict=True)):
        for x in (k, v):
            x[row, :, :begin] = torch.nan
            x[row, :, end:] = torch.nan
    assert torch.equal(attention(q, k, v, causal=False, **ranges), expected)
