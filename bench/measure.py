"""One case, measured: gate first, then all contenders and the compute peak in the same rounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from drope_kernels import _C

from .cases import BenchCase, tensors
from .gate import Gate, run_gate
from .peers import Attend, contender, contender_names
from .timing import Samples, clock_for, interleave, peak_extra_memory

PEAK_PROBE_SECONDS = 0.02
DTYPE_CODES = {"fp32": 0, "fp16": 1, "bf16": 2}  # DType of csrc/attention_params.h


@dataclass(frozen=True)
class Measured:
    case: BenchCase
    gate: Gate
    samples: dict[str, Samples]  # by contender
    memory: dict[str, int | None]  # peak extra bytes, by contender
    peak_flops: float  # of one core, probed between the contenders' calls

    def gflops(self, name: str) -> float:
        return self.case.flops / self.samples[name].median / 1e9

    def peak_fraction(self, name: str) -> float:
        return self.gflops(name) * 1e9 / (self.peak_flops * self.case.threads)

    def speedup_over(self, name: str) -> float:
        return self.samples[name].over(self.samples["drope_kernels"])

    def row(self, name: str) -> dict[str, object]:
        samples = self.samples[name]
        return {
            "case": self.case.name,
            "contender": name,
            "median_ms": samples.median * 1e3,
            "spread": samples.spread,
            "rounds": len(samples.seconds),
            "gflops": self.gflops(name),
            "peak_fraction": self.peak_fraction(name),
            "speedup_of_drope": self.speedup_over(name),
            "peak_extra_mib": None if self.memory[name] is None else self.memory[name] / 2**20,
            "worst_error": self.gate.worst if name == "drope_kernels" else None,
        }


@contextmanager
def torch_threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call(attend: Attend, case: BenchCase) -> Callable[[], object]:
    """The timed call: forward, or forward and backward from one random output gradient."""
    q, k, v = (t.requires_grad_(case.backward) for t in tensors(case))
    if not case.backward:
        return lambda: attend(q, k, v)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), grad_out)


@functools.cache
def measure(case: BenchCase, *, budget: float = 4.0, compiled: bool = True) -> Measured:
    """Gate, then time. `budget` is in wall seconds for all contenders together."""
    with torch_threads(case.threads):
        gate = run_gate(case)
        gate.check(case)
        names = contender_names(case, compiled=compiled)
        runs = {name: call(contender(name, case), case) for name in names}
        peaks: list[float] = []

        def probe() -> None:
            peaks.append(_C.fma_peak(_C.cpu_isa(), DTYPE_CODES[case.dtype], PEAK_PROBE_SECONDS))

        memory = {name: peak_extra_memory(run) for name, run in runs.items()}
        samples = interleave(runs | {"peak": probe}, clock=clock_for(case.threads), budget=budget)
    del samples["peak"]
    peaks.sort()
    return Measured(case, gate, samples, memory, peaks[len(peaks) // 2])
