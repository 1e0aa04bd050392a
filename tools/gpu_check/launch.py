"""Stage launch: what a call costs before its kernel runs: the first of a process, and any other."""

from __future__ import annotations

from typing import Any

from gpu_check.jobs import JobRun
from gpu_check.report import Context, Outcome

JOB_SECONDS = 150.0


def lines(row: dict[str, Any]) -> list[str]:
    backend = row["job"].split()[-1]
    if "host_us" in row:
        parts = [f"{name} {us:.0f}" for name, us in row["host_us"].items()]
        return [f"{backend:10} us of the host: {', '.join(parts)}"]
    found = []
    for cache, seconds in row["first_seconds"].items():
        parts = [f"{name} {s:.2f}" for name, s in seconds.items() if not name.endswith("again")]
        found.append(f"{backend:10} first call, {cache} cache, s: {', '.join(parts)}")
    return found


def run(context: Context) -> Outcome:
    with JobRun(context, "bench.gpu.launch_jobs", JOB_SECONDS) as jobs:
        jobs.ask_all(jobs.opening("list").get("jobs", []))
    good = [row for row in jobs.rows if "error" not in row]
    return jobs.outcome([line for row in good for line in lines(row)])
