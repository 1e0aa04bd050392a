"""Stage train: the loss falls with RoPE, comes back after the drop; tokens per second, memory."""

from __future__ import annotations

from typing import Any

from gpu_check.jobs import JobRun
from gpu_check.report import Context, Outcome

JOB_SECONDS = 200.0


def line(row: dict[str, Any]) -> str:
    parts = []
    for name in ("with_rope", "dropped"):
        part = row[name]
        memory = f", {part['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in part else ""
        parts.append(
            f"{name} loss {part['losses'][0]:.2f} to {part['losses'][-1]:.2f}, "
            f"{part['tokens_per_second']:.0f} tokens/s{memory}"
        )
    return f"{row['job']}: " + "; ".join(parts)


def run(context: Context) -> Outcome:
    with JobRun(context, "bench.gpu.training_jobs", JOB_SECONDS) as jobs:
        jobs.ask_all(jobs.opening("list").get("backends", []))
    return jobs.outcome([line(row) for row in jobs.rows if "error" not in row])
