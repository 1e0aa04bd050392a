"""Stage stress: repeats, graphs, streams, devices and memory beyond 2^31 elements."""

from __future__ import annotations

from typing import Any

from gpu_check.jobs import JobRun
from gpu_check.report import Context, Outcome

JOB_SECONDS = 90.0


def run(context: Context) -> Outcome:
    with JobRun(context, "device.stress_checks", JOB_SECONDS) as jobs:
        listing = jobs.opening("list")
        for backend in listing.get("backends", []):
            jobs.ask_all(f"{backend} {check}" for check in listing["checks"])
    return jobs.outcome([line(row) for row in jobs.rows])


def line(row: dict[str, Any]) -> str:
    verdict = "FAILED" if "error" in row else "ok"
    if "not_run" in row:
        verdict = f"not run: {row['not_run']}"
    return f"{row['job']:44} {row.get('seconds', 0):6.1f} s  {verdict}"
