"""The calls of later stages, made once: Triton then has their kernels when they are needed.

Nothing is compared here: the stages do that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.accelerator import StandIn
from bench.gpu.cases import DRY_SHAPES, GROUPS, GpuCase
from bench.gpu.contenders import ours
from bench.gpu.inputs import make_inputs, run_forward
from device.stress_shapes import SHAPES, Shape, operands

Call = Callable[[str, StandIn], None]


def features(case: GpuCase) -> tuple[object, ...]:
    """What a kernel is compiled for; lengths are not."""
    shape = case.shape
    group = shape.num_heads_q // shape.num_heads_kv
    one_row = shape.batch == 1 and shape.is_decode
    return shape.head_dim, shape.is_decode, case.rope, case.page_size, group, one_row


def bench_cases() -> list[GpuCase]:
    """The first case of each kind."""
    found: dict[tuple[object, ...], GpuCase] = {}
    for case in (case for cases in GROUPS.values() for case in cases):
        found.setdefault(features(case), case)
    return list(found.values())


def of_bench(case: GpuCase) -> Call:
    def call(backend: str, where: StandIn) -> None:
        dry = where.device == "cpu"
        chosen = DRY_SHAPES[0] if dry else case
        inputs = make_inputs(chosen.shape, where.device, torch.float32 if dry else torch.bfloat16)
        attend = ours(chosen, backend, chosen.rope)(inputs)
        with torch.no_grad():
            attend(inputs.q, inputs.k, inputs.v)
        if chosen.shape.backward:
            out, leaves = run_forward(inputs, attend)
            torch.autograd.grad(out, leaves, inputs.grad_out)

    return call


def of_stress(shape: Shape) -> Call:
    def call(backend: str, where: StandIn) -> None:
        data = operands(shape.small() if where.device == "cpu" else shape, where.device)
        with torch.no_grad():
            data.forward(backend)
        data.train(backend)

    return call


# Shapes of GROUPS["quick"] come first of the benchmarks', those of a visit.
CALLS: dict[str, Call] = {
    **{f"ahead of bench: {case.label}": of_bench(case) for case in bench_cases()},
    **{f"ahead of stress: {shape.name}": of_stress(shape) for shape in SHAPES},
}


def run(name: str, backend: str, where: StandIn) -> dict[str, Any]:
    CALLS[name](backend, where)
    return {}
