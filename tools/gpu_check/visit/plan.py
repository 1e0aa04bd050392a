"""The visits, one table: what is asked in which order, what it should take, what it may take.

All seconds are estimates for 16 cores and one H100 or H200; a stage begins with about 12 of them
for a process with torch, the package and a context on the GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu.archive import read_reports
from gpu_check.visit.carried import Unpacked
from gpu_check.visit.earlier import Reports, is_finished, unfinished

NEEDS_NO_PACKAGE = ("layout", "env")  # they run while the package is built
START_SECONDS = 12.0  # of a stage: torch, the package, a context on the GPU


@dataclass(frozen=True)
class Step:
    """One stage of a visit.

    estimate, cap, least: seconds that it should take, that it may take, and the fewest for which it
    is worth starting. basis: where the estimate comes from.
    """

    stage: str
    answers: str
    basis: str
    estimate: float
    cap: float
    least: float
    again: bool = False  # only the jobs that the visit before left failed or unreached
    if_failed: str = ""  # only when this stage failed in the visit before, for its backends
    spare: bool = False  # in seconds that the others leave: no part of the plan's sum

    @property
    def needs_package(self) -> bool:
        return self.stage not in NEEDS_NO_PACKAGE


@dataclass(frozen=True)
class Fixed:
    """Seconds around the stages."""

    what: str
    basis: str
    estimate: float


START = Fixed("start", "bash, python3, nvidia-smi", 5)
UNPACK = Fixed("unpack", "the wheel, the probes, a process that loads each", 5)
BUILD = Fixed("build", "430 s of a CPU, on 16 cores; runs beside the first stages", 90)
PROBES = Fixed("probes", "nvcc, 14 s of a CPU, 5 files", 15)
TAR = Fixed("tar", "after each stage; the last counts", 3)

AHEAD = Step(
    "ahead-triton",
    "nothing: Triton compiles, on many processes, what the next stages run",
    "start 12; 40 kernels in parallel, 2 to 8 s each",
    *(30, 45, 20),
)
BENCH_TRITON = Step(
    "bench-triton",
    "Triton's forward, backward, decode beside SDPA flash, at the shapes of bench-cuda",
    "start 12, ceilings 3; 9 shapes of 3 s",
    *(45, 70, 30),
)
FIRST = (
    Step(
        "layout",
        "does the hardware do what every ptx/ wrapper assumes?",
        "25 probes, 8 processes at a time, 3 s each",
        *(15, 45, 8),
    ),
    Step(
        "env",
        "versions, clocks, runtime; the roofline: a copy, an 8k bf16 product",
        "torch from a cold disk 15, roofline 5",
        *(22, 60, 18),
    ),
    Step(
        "cases",
        "is every named case right on the CUDA kernels, sm_90a and sm_80, bf16 first?",
        "start 12; 730 jobs on 4 workers, 0.2 s each, half of it the yardstick on the CPU",
        *(50, 100, 25),
    ),
    Step(
        "bench-cuda",
        "forward, backward, decode beside SDPA flash and cuDNN: D 64 and 128, S 1k to 16k",
        "start 12, ceilings 3; 9 shapes of 6 s, a compiled rotation 15",
        *(85, 120, 30),
    ),
    Step(
        "cases-triton",
        "is every named case right on the Triton kernels, most useful first?",
        "start 12; 240 kernels a dtype, 2 s of a CPU each, 12 processes: bf16, then the rest",
        *(110, 330, 30),
    ),
    replace(AHEAD, spare=True),
    replace(BENCH_TRITON, spare=True),
)

SECOND = (
    replace(FIRST[0], again=True),
    replace(FIRST[2], again=True),
    replace(FIRST[3], again=True),
    Step(
        "sanitizer",
        "what do memcheck and racecheck say of the CUDA kernels?",
        "start 15 each, slowed calls",
        *(45, 60, 25),
        if_failed="cases",
    ),
    replace(FIRST[4], again=True, estimate=60, cap=80),
    AHEAD,
    BENCH_TRITON,
    Step(
        "train",
        "does a model learn, lose its positions and recover? tokens/s, memory",
        "start 20 with transformers; 80 steps on each of two backends",
        *(50, 80, 30),
    ),
    Step(
        "stress",
        "repeats bit for bit, graphs, streams, far memory: CUDA first",
        "start 12; 200 repeats of 7 shapes",
        *(45, 80, 25),
    ),
    Step("bench-decode", "14 caches", "start 12; 14 caches of 4 s", 70, 120, 30, spare=True),
    Step("launch", "the host's time of a small call", "5 processes", 40, 90, 30, spare=True),
    Step("profile", "what do our kernels wait for?", "replays", 60, 100, 40, spare=True),
)


@dataclass(frozen=True)
class Plan:
    budget: float
    steps: tuple[Step, ...]


VISITS = {1: Plan(330, FIRST), 2: Plan(240, SECOND)}


@dataclass(frozen=True)
class Task:
    """A step as this visit asks for it. only: its jobs, or all."""

    step: Step
    only: frozenset[str] | None
    estimate: float


@dataclass(frozen=True)
class Visit:
    number: int
    budget: float
    tasks: tuple[Task, ...]

    def total(self, missing: Unpacked) -> float:
        return sum(row.estimate for row in self.clock(missing))

    def clock(self, missing: Unpacked) -> list[Fixed]:
        """The seconds in their order, those of spare stages left out; what is missing is made."""
        found, beside = [START, UNPACK], 0.0
        waits = bool(missing.package)
        for task in (task for task in self.tasks if not task.step.spare):
            step = task.step
            jobs = "" if task.only is None else f"{len(task.only)} that the visit before left; "
            if step.stage == "layout" and missing.probes:
                found.append(PROBES)
                beside += PROBES.estimate
            if step.needs_package and waits:
                waits = False
                left = max(0.0, BUILD.estimate - beside)
                found.append(Fixed("wait for build", BUILD.basis, left))
            found.append(Fixed(step.stage, jobs + step.basis, task.estimate))
            beside += task.estimate
        return [*found, TAR]


def task_of(step: Step, earlier: Reports | None) -> Task | None:
    """None where the visit before leaves nothing to ask."""
    if earlier is None:
        return None if step.again or step.if_failed else Task(step, None, step.estimate)
    if step.if_failed:
        report = earlier.get(step.if_failed)
        if report is None or is_finished(report):
            return None
        jobs = unfinished(report).jobs
        backends = None if jobs is None else frozenset(job.split()[0] for job in jobs)
        return Task(step, backends, step.estimate)
    if step.stage not in earlier or not step.again:
        return None if is_finished(earlier.get(step.stage)) else Task(step, None, step.estimate)
    left = unfinished(earlier[step.stage])
    if left.share == 0:
        return None
    start = min(START_SECONDS, step.estimate)
    return Task(step, left.jobs, start + left.share * (step.estimate - start))


def prepare(number: int, after: Path | None, seconds: float = math.inf) -> Visit:
    """The plan of a visit, after what an earlier one left, within at most `seconds`."""
    earlier = None if after is None else read_reports(after)
    plan = VISITS[number]
    tasks = [task_of(step, earlier) for step in plan.steps]
    budget = plan.budget if math.isinf(seconds) else seconds
    return Visit(number, budget, tuple(task for task in tasks if task is not None))
