"""Runs the stages one after another, each in its own process and within its own budget."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .report import FAILED, RUNNING, Context, Outcome, envelope, write_report


@dataclass(frozen=True)
class Stage:
    """module has run(Context) -> Outcome. seconds: the budget after which it is stopped."""

    module: str
    seconds: float


LEAST_SECONDS = 20.0  # a stage is not started for less

# In this order, most telling first. Each fits a ten-minute slot of its own.
STAGES = {
    "env": Stage("gpu_check.env", 120),
    "build": Stage("gpu_check.build", 480),
    "cases-triton": Stage("gpu_check.cases", 420),
    "layout": Stage("gpu_check.layout", 420),
    "cases": Stage("gpu_check.cases", 300),
    "stress": Stage("gpu_check.stress", 400),
    "bench-quick": Stage("gpu_check.bench", 300),
    "bench-decode": Stage("gpu_check.bench", 300),
    "launch": Stage("gpu_check.launch", 240),
    "sanitizer": Stage("gpu_check.sanitizer", 420),
    "profile": Stage("gpu_check.profiling", 420),
    "train": Stage("gpu_check.training", 300),
    "bench-rope": Stage("gpu_check.bench", 400),
    "bench-lengths": Stage("gpu_check.bench", 400),
    "bench-long": Stage("gpu_check.bench", 300),
    "bench-flex": Stage("gpu_check.bench", 300),
    "peers": Stage("gpu_check.peers", 570),
}


def parse(arguments: list[str], stages: dict[str, Stage]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/gpu_check.sh")
    parser.add_argument("out", type=Path, help="folder for one JSON file per stage")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of: {', '.join(stages)}")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: compile, launch nothing")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="for all stages together; then stop"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in stages]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; the stages are {', '.join(stages)}")
    return options


def run_stage(name: str, stage: Stage, out: Path, dry_run: bool) -> dict[str, Any]:
    """Returns the stage's report; writes it when the stage itself could not."""
    context = Context(name, out, dry_run, stage.seconds)
    context.path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu_check.stage", stage.module, name, str(out)]
    command += [str(stage.seconds), "dry-run" if dry_run else "measure"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
        try:
            code = process.wait(timeout=stage.seconds)
            reason = f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reason = f"stopped: over its budget of {stage.seconds:g} s"
        errors.seek(0)
        error_text = errors.read()
    sys.stderr.write(error_text)
    if context.path.exists():
        report = json.loads(context.path.read_text())
        if report["status"] != RUNNING:
            return report
    else:
        report = envelope(context, Outcome(FAILED, {}, []))
    last_lines = error_text.strip().splitlines()[-3:]
    report["status"] = FAILED
    report["reason"] = "; ".join([reason, *last_lines])
    write_report(context.path, report)
    return report


def main(arguments: list[str], stages: dict[str, Stage] = STAGES) -> int:
    """0 when no stage failed, else 1."""
    options = parse(arguments, stages)
    options.out.mkdir(parents=True, exist_ok=True)
    summary, failed = [], False
    deadline = time.monotonic() + options.seconds
    for name in options.stages or stages:
        print(f"== {name}", flush=True)
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            summary.append(f"-- {name}: not started, {left:.0f} s left")
            failed = True
            continue
        stage = replace(stages[name], seconds=min(stages[name].seconds, left))
        report = run_stage(name, stage, options.out, options.dry_run)
        for line in report["table"]:
            print(f"   {line}")
        ending = f"{report['status']}, {report['seconds']} s"
        print(
            f"   {ending}: {report['reason']}" if report["reason"] else f"   {ending}", flush=True
        )
        summary.append(f"-- {name}: {ending}")
        failed |= report["status"] == FAILED
    print("\n".join(summary))
    return int(failed)
