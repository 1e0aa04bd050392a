"""Jobs of the stages bench-*: one case, every contender gated, then timed in the same rounds.

Job names: "ceilings", or "GROUP LABEL". A contender with a wrong result has an error and no times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from bench.gpu import exact, timing
from bench.gpu.accelerator import StandIn
from bench.gpu.cases import PARTS, GpuCase, Part, find, is_ours
from bench.gpu.contenders import Contender, contenders, expected_inputs, restore
from bench.gpu.failures import CALL_ERRORS
from bench.gpu.inputs import gate, make_inputs, run_forward
from bench.gpu.peer_calls import Attention
from bench.gpu.sm80 import SM80

COPY_BYTES = 4 << 30
MATMUL_SIZE = 8192
Row = dict[str, Any]


def ceilings(where: StandIn) -> Row:
    """The roofline of this machine, as stage env measures it, in the same session as the rows."""
    if where.device == "cpu":
        return {"copy": None, "matmul": None}
    return {
        "copy": timing.copy_bandwidth(COPY_BYTES),
        "matmul": timing.matmul_rate(MATMUL_SIZE),
    }


def check_forward(inputs: exact.Inputs, one: Contender, call: Attention) -> Row:
    """Relative error of out; ValueError when it is over its limit."""
    expected = expected_inputs(inputs, one.rope)
    with torch.no_grad():
        return gate({"out": exact.forward_error(expected, call(inputs.q, inputs.k, inputs.v))})


def check_gradients(inputs: exact.Inputs, one: Contender, call: Attention) -> Row:
    """As `check_forward`; empty where a float32 reference of them would take too long."""
    out, leaves = run_forward(inputs, call)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    if inputs.q.shape[2] * inputs.k.shape[2] * inputs.group > exact.MAX_GRADIENT_SCORES:
        return {}
    expected = expected_inputs(inputs, one.rope)
    found = exact.gradient_errors(expected, grads, restore(inputs, one.rope))
    return gate(dict(zip(("dq", "dk", "dv"), found, strict=True)))


def gated(
    case: GpuCase, inputs: exact.Inputs, entries: list[Contender]
) -> tuple[dict[str, Attention], dict[str, Row]]:
    """(the calls that may be timed, a row of each contender: its errors or its error).

    A peer that has no backward at all keeps its forward, beside the error of its backward.
    """
    calls: dict[str, Attention] = {}
    rows: dict[str, Row] = {}
    for one in entries:
        row = rows[one.name] = {"case": case.label, "contender": one.name}
        try:
            call = one.make(inputs)
            row["errors"] = check_forward(inputs, one, call)
            calls[one.name] = call
            if case.shape.backward:
                row["errors"] |= check_gradients(inputs, one, call)
        except CALL_ERRORS as error:
            row["error"] = f"{type(error).__name__}: {error}"[:600]
            if is_ours(row) or isinstance(error, ValueError):
                calls.pop(one.name, None)
    return calls, rows


def passes(
    inputs: exact.Inputs, call: Attention, *, backward: bool
) -> dict[str, Callable[[], Any]]:
    """What is timed of one contender: forward alone; backward alone; both, as training runs."""

    def forward() -> Any:
        with torch.no_grad():
            return call(inputs.q, inputs.k, inputs.v)

    if not backward:
        return {"forward": forward}

    def train() -> Any:
        out, leaves = run_forward(inputs, call)
        return torch.autograd.grad(out, leaves, inputs.grad_out)

    out, leaves = run_forward(inputs, call)

    def differentiate() -> Any:
        return torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)

    return {"forward": forward, "backward": differentiate, "train": train}


def rates(case: GpuCase, kind: str, milliseconds: float) -> Row:
    """Useful work over time: TB/s of cache read by a decode, TFLOP/s otherwise."""
    shape = case.shape
    if shape.is_decode:
        return {"terabytes_per_second": shape.kv_bytes / milliseconds / 1e9}
    flops = {
        "forward": shape.forward_flops,
        "backward": shape.backward_flops,
        "train": shape.forward_flops + shape.backward_flops,
    }
    return {f"{kind}_tflops": flops[kind] / milliseconds / 1e9}


def sm80_differs(case: GpuCase) -> bool:
    """Whether the two families run different kernels: the plain forward up to head_dim 128."""
    return not case.shape.is_decode and not case.rope and case.shape.head_dim <= 128


def chosen_contenders(
    case: GpuCase, where: StandIn, flex: bool, part: Part | None
) -> list[Contender]:
    backends = [name for name in where.backends if name != SM80 or sm80_differs(case)]
    if part is not None:
        backends = [name for name in backends if name in part.backends]
    found = contenders(case, backends, flex)
    if part is None or part.peers is None:
        return found
    return [one for one in found if is_ours({"contender": one.name}) or one.name in part.peers]


def measure(
    case: GpuCase, where: StandIn, flex: bool = False, part: Part | None = None
) -> list[Row]:
    """One row a contender."""
    dtype = torch.bfloat16 if where.device == "cuda" else torch.float32
    inputs = make_inputs(case.shape, where.device, dtype)
    calls, rows = gated(case, inputs, chosen_contenders(case, where, flex, part))
    work = {
        name: passes(inputs, call, backward=case.shape.backward and "error" not in rows[name])
        for name, call in calls.items()
    }
    sample = where.timer()
    for kind in ("forward", "backward", "train"):
        chosen = {name: one[kind] for name, one in work.items() if kind in one}
        if not chosen:
            continue
        for name, times in timing.interleave(chosen, sample, where.target_ms).items():
            rows[name][kind] = asdict(times)
            rows[name] |= rates(case, kind, times.median_ms)
            rows[name].setdefault("peak_bytes", {})[kind] = where.peak_bytes(chosen[name])
    return list(rows.values())


def run_job(job: str, where: StandIn) -> Row:
    if job == "ceilings":
        return {**ceilings(where), "backends": list(where.backends)}
    group, _, label = job.partition(" ")
    case = find(group, label)
    shape = asdict(case.shape) | {"rope": case.rope, "page_size": case.page_size}
    rows = measure(case, where, flex=group == "flex", part=PARTS.get(group))
    return {"shape": shape, "clocks": where.clocks(), "rows": rows}
