"""Stages bench-GROUP: our kernels and the peers at the shapes of one group of bench_cases."""

from __future__ import annotations

import math
from typing import Any

from bench.gpu.cases import DRY_SHAPES, cases_of, is_ours
from gpu_check.jobs import JobRun
from gpu_check.report import FAILED, Context, Outcome

JOB_SECONDS = 150.0


def run(context: Context) -> Outcome:
    group = context.name.removeprefix("bench-")
    with JobRun(context, "bench.gpu.jobs", JOB_SECONDS) as jobs:
        if found := jobs.opening("ceilings"):
            jobs.data["ceilings"] = found
            name, cases = ("dry", DRY_SHAPES) if context.dry_run else (group, cases_of(group))
            jobs.ask_all(f"{name} {case.label}" for case in cases)
    measured = [row for answer in jobs.rows for row in answer.get("rows", [])]
    outcome = jobs.outcome([*roofline(jobs.data.get("ceilings")), *table(measured)])
    wrong = [row for row in measured if is_ours(row) and "error" in row]
    if wrong and not context.dry_run:
        lines = [f"{row['case']} {row['contender']}: {row['error'][:100]}" for row in wrong]
        return Outcome(FAILED, outcome.data, [*outcome.table, *lines], "ours has no number")
    return outcome


def roofline(ceilings: dict[str, Any] | None) -> list[str]:
    if not ceilings or not ceilings["copy"]:
        return []
    return [
        f"copy {ceilings['copy']['terabytes_per_second']:.2f} TB/s, "
        f"bf16 matmul {ceilings['matmul']['tflops']:.0f} TFLOP/s"
    ]


KINDS = ("forward_tflops", "backward_tflops", "train_tflops", "terabytes_per_second")


def text(rate: float) -> str:
    return "-" if math.isnan(rate) else f"{rate:.2f}" if rate < 20 else f"{rate:.0f}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each contender of ours: its rates, and over the best peer at each."""
    lines = []
    for row in rows:
        if not is_ours(row) or "errors" not in row:
            continue
        peers = [one for one in rows if one["case"] == row["case"] and not is_ours(one)]
        parts = []
        for kind in (kind for kind in KINDS if kind in row):
            best = max((one for one in peers if kind in one), key=lambda one: one[kind], default={})
            ratio = f" ({row[kind] / best[kind]:.2f}x {best['contender']})" if best else ""
            parts.append(f"{kind.split('_')[0]} {text(row[kind])}{ratio}")
        lines.append(f"{row['case']:34} {row['contender']:14} {', '.join(parts)}")
    return lines
