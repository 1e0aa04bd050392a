"""Stage profile: Nsight Compute's counters of our kernels at three shapes, as numbers in JSON.

ncu measures one launch by replaying it, at the clock the card has: its default of locking the
clock would change the card's settings.
"""

from __future__ import annotations

import csv
import io
import math
import re
from typing import Any

from bench import machine
from gpu_check import package
from gpu_check.report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome
from gpu_check.watched import find_tool, watch

# (backend, target), most telling first.
RUNS = (
    ("cuda", "large_train_128"),
    ("cuda", "large_train_64"),
    ("cuda", "large_decode"),
    ("triton", "large_train_128"),
    ("triton", "large_decode"),
)
RUN_SECONDS = 150.0
# Demangled names: our namespace; Triton's have no parameters, as torch's do.
OUR_KERNELS = r"regex:drope::|^\w+_kernel$"
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "SchedulerStats",
    "Occupancy",
    "LaunchStats",
)
TENSOR = re.compile(r"pipe_tensor.*pct_of_peak_sustained_active")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
FEW = {
    "duration": "gpu__time_duration.sum",
    "registers": "launch__registers_per_thread",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
MOST_STALLS = 4


def command(tool_path: str) -> list[str]:
    sections = [word for name in SECTIONS for word in ("--section", name)]
    kernels = ["--kernel-name-base", "demangled", "--kernel-name", OUR_KERNELS]
    return [tool_path, "--clock-control", "none", *kernels, *sections, "--page", "raw", "--csv"]


def number(text: str) -> float | None:
    """None for text, and for the "nan" that ncu writes where it divided by 0."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse(log: str) -> list[dict[str, Any]]:
    """One entry a launch: {"kernel", "metrics", "units"}; the log holds the program's lines too."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    rows = list(csv.reader(io.StringIO("\n".join(lines))))
    if not rows or "Kernel Name" not in rows[0]:
        return []
    header, *rest = rows
    units = dict(zip(header, rest[0], strict=False)) if rest else {}
    found = []
    for row in rest[1:]:  # below the names comes a row of units
        fields = dict(zip(header, row, strict=False))
        metrics = {name: number(text) for name, text in fields.items() if "__" in name}
        known = {name: value for name, value in metrics.items() if value is not None}
        found.append(
            {
                "kernel": fields["Kernel Name"],
                "metrics": known,
                "units": {name: units.get(name, "") for name in known if units.get(name)},
            }
        )
    return found


def summary(launch: dict[str, Any]) -> dict[str, Any]:
    """The numbers one looks at first: tensor pipes, what warps wait for, duration, registers."""
    metrics = launch["metrics"]
    stalls = {
        match[1]: value for name, value in metrics.items() if (match := STALL.fullmatch(name))
    }
    worst = sorted(stalls.items(), key=lambda pair: -pair[1])[:MOST_STALLS]
    tensor = {name: value for name, value in metrics.items() if TENSOR.search(name)}
    few = {label: metrics[name] for label, name in FEW.items() if name in metrics}
    return {"kernel": launch["kernel"], **few, "tensor": tensor, "stalls": dict(worst)}


def line(backend: str, target: str, found: dict[str, Any]) -> str:
    name = re.sub(r"[<(].*", "", found["kernel"]).rsplit("::", 1)[-1]
    tensor = max(found["tensor"].values(), default=float("nan"))
    stalls = ", ".join(f"{reason} {value:.1f}" for reason, value in found["stalls"].items())
    return (
        f"{backend:6} {target:16} {name[:34]:34} tensor {tensor:3.0f}%, waits per issue: {stalls}"
    )


def run(context: Context) -> Outcome:
    tool_path = find_tool("ncu")
    data: dict[str, Any] = {"tool": tool_path, "rows": []}
    if not context.dry_run:
        if not machine.gpu_fields():
            return Outcome(FAILED, data, [], "nvidia-smi finds no GPU")
        if tool_path is None:
            return Outcome(NOT_MEASURED, data, [], "ncu is not on this machine")
    built = package.find_or_build(context)
    if built.error:
        return Outcome(FAILED, data | {"builds": built.builds}, [], built.error)
    table = []
    for backend, target in (("reference", "decode"),) if context.dry_run else RUNS:
        seconds = min(RUN_SECONDS, context.remaining() - 5)
        row: dict[str, Any] = {"backend": backend, "target": target}
        if seconds < 15:
            data["rows"].append(row | {"error": "no time left"})
            continue
        watched = watch(
            command(tool_path or "ncu"),
            built.folder,
            (target,),
            dry_run=context.dry_run,
            seconds=seconds,
            backend=backend,
        )
        launches = parse(watched.log)
        row["launches"] = launches
        row["summaries"] = [summary(launch) for launch in launches]
        if not launches and not (context.dry_run and watched.completed):
            row["error"] = f"no counters, exit status {watched.returncode}: {watched.log_end}"
        table += [line(backend, target, found) for found in row["summaries"]]
        data["rows"].append(row)
        context.save(Outcome(RUNNING, data, []))
    failed = [row for row in data["rows"] if "error" in row]
    table += [
        f"{row['backend']} {row['target']}: {row['error'].splitlines()[-1]}" for row in failed
    ]
    if failed:
        return Outcome(FAILED, data, table, "not every shape was profiled")
    if context.dry_run:
        return Outcome(NOT_MEASURED, data, table, "dry run: the calls ran on the CPU")
    return Outcome(OK, data, table)
