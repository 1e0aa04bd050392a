"""Jobs of the stages cases: one named case of the test suite on one backend of the device.

Job names: "BACKEND DTYPE MODE CASE". Inputs, yardstick, peer and tolerance are those of
tests/support: what passes here passes for the reason it passes there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import checker
import torch
from calls import Call, make_call
from cases import BY_NAME, CASES, Case

from bench.gpu.accelerator import StandIn
from device import ahead, decode_cases, foreign_arrays
from device.device_calls import on_device, run_in

MULTIPLE = 8  # of the head_dims that the CUDA kernels take


def may_refuse(backend: str, case: Case) -> bool:
    """What the CUDA kernels leave to Triton, which serves everything; else a refusal fails."""
    dims = (case.head_dim, case.value_dim)
    few = case.softcap is not None or any(dim % MULTIPLE for dim in dims)
    return few and backend != "triton"


@cache
def inputs(name: str, dtype: torch.dtype) -> Call:
    return make_call(BY_NAME[name], dtype)


def with_dirty_padding(call: Call) -> Call:
    """Keys outside kv_start and kv_end are memory of no meaning: NaN there may reach nothing."""
    case = call.case
    if case.kv_start is None and case.kv_end is None:
        return call
    index = torch.arange(case.seqlen_kv)
    start = torch.tensor(case.kv_start or (0,) * case.batch)[:, None]
    end = torch.tensor(case.kv_end or (case.seqlen_kv,) * case.batch)[:, None]
    outside = ((index < start) | (index >= end))[:, None, :, None]
    k, v = (x.masked_fill(outside, torch.nan) for x in (call.k, call.v))
    return replace(call, k=k, v=v)


def check(backend: str, dtype: torch.dtype, mode: str, name: str, where: StandIn) -> dict[str, Any]:
    """{} when the case passes, {"refused": why}; MismatchError when it does not pass."""
    call = inputs(name, dtype)
    given = with_dirty_padding(call)
    try:
        ours = run_in(mode, where, lambda: on_device(given, where.device).run(backend))
    except ValueError as error:
        if not str(error).startswith(checker.REFUSAL) or not may_refuse(backend, call.case):
            raise
        return {"refused": str(error).removeprefix(checker.REFUSAL)}
    checker.compare(call, ours, checker.yardstick(name, dtype), checker.peer_results(name, dtype))
    return {}


def listing(where: StandIn) -> dict[str, Any]:
    return {
        "backends": list(where.backends),
        "cases": [case.name for case in CASES],
        "decodes": [case.name for case in decode_cases.CASES],
        "foreign": list(foreign_arrays.CHECKS),
        "ahead": list(ahead.CALLS),
    }


def run_job(job: str, where: StandIn) -> dict[str, Any]:
    """The job "list" says what there is to ask for; any other is one case, as the module says."""
    if job == "list":
        return listing(where)
    backend, dtype_name, mode, name = job.split(maxsplit=3)
    if name in foreign_arrays.CHECKS:
        return foreign_arrays.CHECKS[name](backend, where)
    if name in ahead.CALLS:
        return ahead.run(name, backend, where)
    dtype = getattr(torch, dtype_name)
    if name in decode_cases.BY_NAME:
        return decode_cases.check(backend, dtype, mode, name, where)
    return check(backend, dtype, mode, name, where)
