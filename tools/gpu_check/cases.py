"""Stages cases and cases-triton: the test suite's named cases on the device, and decode.

The Triton kernels have a stage of their own. Almost all of its time goes into compiling, a kernel
for every combination of features; so it has many workers. So has ahead-triton, which compares
nothing: it makes the calls of later stages, that they find their kernels compiled.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from bench.gpu.sm80 import SM80
from gpu_check.jobs import JobRun
from gpu_check.report import FAILED, Context, Outcome

CASES, OF_TRITON, AHEAD = "cases", "cases-triton", "ahead-triton"  # the stages
JOB_SECONDS = {CASES: 30.0, OF_TRITON: 60.0, AHEAD: 60.0}  # nvcc has compiled, Triton has not
# Unwritten memory is NaN in both; "free" runs the kernels that need not be deterministic.
FREE, DETERMINISTIC = "free", "deterministic"
# Most telling first: bfloat16, then what differs in conversions and masks alone.
KINDS = (("bfloat16", FREE), ("bfloat16", DETERMINISTIC), ("float16", FREE))
TRITON_KINDS = (
    *(("bfloat16", FREE), ("float32", FREE), ("float16", FREE)),
    ("bfloat16", DETERMINISTIC),
)
# Of the Triton kernels these first: a case of every feature, those that models use most.
USEFUL = (
    *("regular", "rope", "gqa_4_to_1", "head_dim_128", "decode", "decode_rope", "packed_rope"),
    *("rope_gqa", "right_padded", "scale_per_head", "decode_pages", "window_16", "regular_full"),
)
# Workers, contexts on one GPU: where nothing is compiled the yardstick keeps a few cores busy.
MOST_WORKERS = {CASES: 4, OF_TRITON: 12, AHEAD: 12}
DRY_WORKERS = 2
LISTING = "list"  # the job that says what there is to ask for; a row only where it failed
DRY = {
    *("regular", "fused_projection_rope", "expanded_heads", "packed_rope", "softcap"),
    *("padded_both_sides_full", "decode_pages_rotated", "decode_rows"),
}


def stage_backends(stage: str, backends: list[str]) -> list[str]:
    """Those that the stage checks; in a dry run both check the one that stands in."""
    of_triton = [name for name in backends if name in ("triton", "reference")]
    return [name for name in backends if name != "triton"] if stage == CASES else of_triton


def most_useful_first(names: list[str]) -> list[str]:
    worth = {name: index for index, name in enumerate(USEFUL)}
    return sorted(names, key=lambda name: worth.get(name, len(worth)))


def job_names(listing: dict[str, Any], backends: list[str], stage: str, dry_run: bool) -> list[str]:
    """One kind of every backend after the other, calls with foreign arrays once."""

    def names(backend: str) -> list[str]:
        """The decode kernels are the same in both families."""
        found = listing["cases"] + ([] if backend == SM80 else listing["decodes"])
        found = most_useful_first(found) if stage == OF_TRITON else found
        return [name for name in found if name in DRY] if dry_run else found

    if stage == AHEAD:
        ahead = listing["ahead"][:2] if dry_run else listing["ahead"]
        return [f"{backend} bfloat16 {FREE} {name}" for backend in backends for name in ahead]
    kinds = TRITON_KINDS if stage == OF_TRITON else KINDS
    jobs = [
        f"{backend} {dtype} {mode} {name}"
        for dtype, mode in kinds
        for backend in backends
        for name in names(backend)
    ]
    foreign = [(backend, name) for backend in backends for name in listing["foreign"]]
    jobs += [f"{backend} float16 {FREE} {name}" for backend, name in foreign if backend != SM80]
    return jobs


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each backend, dtype and mode; then what was refused or not run: few."""
    counts: dict[str, Counter[str]] = {}
    reasons: dict[str, str] = {}
    for row in (row for row in rows if row["job"] != LISTING):
        backend, dtype, mode, name = row["job"].split(maxsplit=3)
        aside = next((key for key in ("refused", "not_run") if key in row), "passed")
        verdict = "failed" if "error" in row else aside.replace("_", " ")
        counts.setdefault(f"{backend} {dtype} {mode}", Counter())[verdict] += 1
        if aside in row:
            reasons[f"{backend} {name}"] = f"{verdict}: {row[aside].strip()}"
    lines = []
    for kind, counted in counts.items():
        parts = ", ".join(f"{number} {verdict}" for verdict, number in counted.items())
        lines.append(f"{kind:32} {parts}")
    return lines + [f"{name} {why[:110]}" for name, why in reasons.items()]


def num_workers(context: Context) -> int:
    if context.dry_run:
        return DRY_WORKERS
    return max(1, min(MOST_WORKERS[context.name], (os.cpu_count() or 1) - 2))


def run(context: Context) -> Outcome:
    seconds = JOB_SECONDS[context.name]
    with JobRun(context, "device.named_cases", seconds, num_workers(context)) as jobs:
        if listing := jobs.opening(LISTING):
            backends = stage_backends(context.name, listing["backends"])
            jobs.data |= {"backends": backends}
            if not backends:
                reason = f"of this stage none is available, there are {listing['backends']}"
                return Outcome(FAILED, jobs.data, [], reason)
            jobs.ask_all(job_names(listing, backends, context.name, context.dry_run))
    return jobs.outcome(table(jobs.rows))
