"""Stage sanitizer: compute-sanitizer's tools on a handful of small calls; it watches our kernels
alone, but initcheck needs torch's too.

memcheck, initcheck and synccheck watch every family. racecheck watches the sm_80 kernels only: it
does not follow mbarriers and bulk copies, and reports hazards in correct sm_90a pipelines. The
races of those are decided by the emulator's (`make race`) and by the repeats of stage stress.

Triton's kernels are not watched: shared memory and barriers in them are their compiler's work, and
the minutes go to what was written by hand.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from bench import machine
from bench.gpu.sm80 import SM80
from gpu_check import package
from gpu_check.report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome
from gpu_check.watched import Watched, find_tool, watch

FORWARD = ("forward_128", "forward_64_rope", "forward_256")
TRAIN = ("train_128_rope", "train_64_window_rows", "train_96_packed")
DECODE = ("decode_pages", "decode")
ALL = FORWARD + TRAIN + DECODE
RUN_SECONDS = 120.0
OUR_KERNELS = "kns=drope"  # a substring of their mangled names: the namespace


@dataclass(frozen=True)
class Watch:
    tool: str
    backend: str
    targets: tuple[str, ...]


# Most telling first.
RUNS = (
    Watch("memcheck", "cuda", ALL),
    Watch("memcheck", SM80, FORWARD),
    Watch("racecheck", SM80, ALL),
    Watch("synccheck", "cuda", ALL),
    Watch("initcheck", "cuda", ALL),
)
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed)")


def command(tool_path: str, one: Watch) -> list[str]:
    options = ["--print-limit", "20"]
    if one.tool != "initcheck":  # it has to see torch's kernels write what ours read
        options += ["--kernel-name", OUR_KERNELS]
    if one.tool == "memcheck":  # errors of API calls would be torch's own
        options += ["--report-api-errors", "no"]
    return [tool_path, "--tool", one.tool, *options]


def verdict(watched: Watched) -> tuple[str, str]:
    """(status, what was found): a tool that says nothing, or calls that did not end, fail."""
    found = [int(number) for number in SUMMARY.findall(watched.log)]
    if watched.returncode is None:
        return FAILED, "stopped: out of time"
    if not watched.completed:
        return FAILED, f"the calls did not end: exit status {watched.returncode}"
    if not found:
        return FAILED, "the tool wrote no summary"
    return (FAILED, f"{sum(found)} errors") if sum(found) else (OK, "0 errors")


def run(context: Context) -> Outcome:
    tool_path = find_tool("compute-sanitizer")
    data: dict[str, Any] = {"tool": tool_path, "rows": []}
    if not context.dry_run:
        if not machine.gpu_fields():
            return Outcome(FAILED, data, [], "nvidia-smi finds no GPU")
        if tool_path is None:
            return Outcome(NOT_MEASURED, data, [], "compute-sanitizer is not on this machine")
    built = package.find_or_build(context)
    if built.error:
        return Outcome(FAILED, data | {"builds": built.builds}, [], built.error)
    wanted = [one for one in RUNS if context.wants(one.backend)]
    for one in RUNS[:2] if context.dry_run else wanted:
        row = asdict(one)
        seconds = min(RUN_SECONDS, context.remaining() - 5)
        if seconds < 15:
            row |= {"status": NOT_MEASURED, "found": "no time left"}
        else:
            row |= run_one(one, tool_path or "compute-sanitizer", built, context, seconds)
        data["rows"].append(row)
        context.save(Outcome(RUNNING, data, []))
    return conclude(data)


def run_one(
    one: Watch, tool_path: str, built: package.Package, context: Context, seconds: float
) -> dict[str, Any]:
    watched = watch(
        command(tool_path, one),
        built.folder,
        one.targets,
        dry_run=context.dry_run,
        seconds=seconds,
        backend=one.backend,
    )
    status, found = verdict(watched)
    if context.dry_run and watched.completed:
        status, found = NOT_MEASURED, "the calls ran on the CPU"
    return {"status": status, "found": found, "log_end": watched.log_end}


def conclude(data: dict[str, Any]) -> Outcome:
    lines = [
        f"{row['tool']:10} {row['backend']:10} {len(row['targets'])} calls  "
        f"{row['status']}: {row['found']}"
        for row in data["rows"]
    ]
    statuses = {row["status"] for row in data["rows"]}
    if FAILED in statuses:
        return Outcome(FAILED, data, lines, "see log_end of the runs that failed")
    if NOT_MEASURED in statuses:
        return Outcome(NOT_MEASURED, data, lines, "not every tool ran")
    return Outcome(OK, data, lines)
