"""A whole recalibration step on these kernels, against the same Trainer on torch's SDPA.

Attention is a part of the step only: the bound says what any attention could give at most that is
as fast as ours, computed from the same run (Amdahl's law).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest

from .measure import torch_threads
from .recalibration import (
    CONTENDERS,
    AttentionAlone,
    StepCase,
    attention_runs,
    check_gate,
    time_steps,
)
from .timing import Samples, clock_for, interleave

BOUND = "bound by Amdahl's law"
CASES = [StepCase("fp32"), StepCase("bf16")]


@dataclass(frozen=True)
class MeasuredSteps:
    case: StepCase
    worst_error: float
    steps: dict[str, Samples]
    attention: AttentionAlone

    def row(self, name: str) -> dict[str, object]:
        samples = self.steps[name]
        return {
            "case": self.case.name,
            "contender": name,
            "median_ms": samples.median * 1e3,
            "spread": samples.spread,
            "rounds": len(samples.seconds),
            "tokens_per_second": self.case.context_length / samples.median,
            "gflops": None,
            "peak_fraction": None,
            "speedup_of_drope": samples.over(self.steps["drope_kernels"]),
            "peak_extra_mib": None,
            "worst_error": self.worst_error if name == "drope_kernels" else None,
        }

    def bound_row(self) -> dict[str, object]:
        step = self.steps["sdpa"].median
        bound = self.attention.bound(step)
        return self.row("sdpa") | {
            "contender": BOUND,
            "median_ms": step / bound * 1e3,
            "spread": None,
            "tokens_per_second": None,
            "speedup_of_drope": bound,
            "attention_share_of_sdpa_step": self.attention.sdpa / step,
            "attention_speedup": self.attention.sdpa / self.attention.ours,
        }


@functools.cache
def measure_steps(case: StepCase) -> MeasuredSteps:
    with torch_threads(case.threads):
        worst_error = check_gate(case)
        alone = interleave(attention_runs(case), clock=clock_for(case.threads), budget=10.0)
        seconds = {name: case.num_layers * x.median for name, x in alone.items()}
        steps = time_steps(case)
    attention = AttentionAlone(seconds["drope_kernels"], seconds["sdpa"])
    return MeasuredSteps(case, worst_error, steps, attention)


@pytest.mark.parametrize("contender", [*CONTENDERS, BOUND])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recalibration_step(case, contender, replay):
    measured = measure_steps(case)
    if contender == BOUND:
        replay(measured.bound_row(), measured.steps["sdpa"])
    else:
        replay(measured.row(contender), measured.steps[contender])
