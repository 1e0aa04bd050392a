"""Runs stages, each in its own process and within its own budget."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_check.report import FAILED, RUNNING, Context, Outcome, envelope, write_report


@dataclass(frozen=True)
class Stage:
    """module has run(Context) -> Outcome. seconds: the budget after which it is stopped."""

    module: str
    seconds: float


LEAST_SECONDS = 20.0  # a stage is not started for less
GRACE_SECONDS = 2.0  # for what a stage started to end by itself

# In this order, most telling first. Each fits a ten-minute slot of its own.
STAGES = {
    "env": Stage("gpu_check.env", 120),
    "build": Stage("gpu_check.build", 480),
    "layout": Stage("gpu_check.layout", 420),
    "cases": Stage("gpu_check.cases", 300),
    "bench-cuda": Stage("gpu_check.bench", 300),
    "cases-triton": Stage("gpu_check.cases", 420),
    "ahead-triton": Stage("gpu_check.cases", 300),
    "bench-triton": Stage("gpu_check.bench", 300),
    "train": Stage("gpu_check.training", 300),
    "stress": Stage("gpu_check.stress", 400),
    "bench-quick": Stage("gpu_check.bench", 300),
    "bench-decode": Stage("gpu_check.bench", 300),
    "launch": Stage("gpu_check.launch", 240),
    "sanitizer": Stage("gpu_check.sanitizer", 420),
    "profile": Stage("gpu_check.profiling", 420),
    "bench-rope": Stage("gpu_check.bench", 400),
    "bench-lengths": Stage("gpu_check.bench", 400),
    "bench-long": Stage("gpu_check.bench", 300),
    "bench-flex": Stage("gpu_check.bench", 300),
}


class RunningStage:
    """One stage in its process, which ends with `finish` or `kill`."""

    def __init__(
        self,
        name: str,
        stage: Stage,
        out: Path,
        dry_run: bool,
        only: Iterable[str] | None = None,
    ) -> None:
        self.seconds = stage.seconds
        self.context = Context(name, out, dry_run, stage.seconds)
        self.context.path.unlink(missing_ok=True)
        self.deadline = time.monotonic() + stage.seconds
        command = [sys.executable, "-m", "gpu_check.stage", stage.module, name, str(out)]
        command += [str(stage.seconds), "dry-run" if dry_run else "measure"]
        descriptor, name_of_errors = tempfile.mkstemp()
        Path(name_of_errors).unlink()  # the file, without a name, that takes its error stream
        self.errors = os.fdopen(descriptor, "w+", errors="replace")
        jobs = subprocess.DEVNULL if only is None else subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=jobs, stderr=self.errors, text=True, start_new_session=True
        )
        if only is not None:
            assert self.process.stdin is not None
            with self.process.stdin as pipe:
                json.dump(sorted(only), pipe)

    def kill(self) -> None:
        """SIGTERM first: ninja then ends its compilers, which are in groups of their own."""
        if not self.running():
            return
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=GRACE_SECONDS)
            time.sleep(GRACE_SECONDS / 4)  # the group may outlive the stage by a moment
            os.killpg(self.process.pid, signal.SIGKILL)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        except ProcessLookupError:
            return  # nobody of the group is left

    def running(self) -> bool:
        return self.process.poll() is None

    def finish(
        self, while_waiting: Callable[[], None] | None = None, every: float = math.inf
    ) -> dict[str, Any]:
        """The stage's report; written here when the stage itself could not."""
        reason = f"stopped: over its budget of {self.seconds:g} s"
        try:
            while (left := self.deadline - time.monotonic()) > 0 or not self.running():
                try:
                    reason = f"exit status {self.process.wait(timeout=min(left, every))}"
                    break
                except subprocess.TimeoutExpired:
                    if while_waiting is not None:
                        while_waiting()
        finally:  # also when a signal ends the wait
            self.kill()
        self.errors.seek(0)
        error_text = self.errors.read()
        self.errors.close()
        sys.stderr.write(error_text)
        return self.report(reason, error_text)

    def report(self, reason: str, error_text: str) -> dict[str, Any]:
        if self.context.path.exists():
            report: dict[str, Any] = json.loads(self.context.path.read_text())
            if report["status"] != RUNNING:
                return report
        else:
            report = envelope(self.context, Outcome(FAILED, {}, []))
        report["status"] = FAILED
        report["reason"] = "; ".join([reason, *error_text.strip().splitlines()[-3:]])
        write_report(self.context.path, report)
        return report


def ending(report: dict[str, Any]) -> str:
    return f"{report['status']}, {report['seconds']} s"


def show(report: dict[str, Any]) -> None:
    """The stage's table, then how it ended and why."""
    for line in report["table"]:
        print(f"   {line}")
    why = f": {report['reason']}" if report["reason"] else ""
    print(f"   {ending(report)}{why}", flush=True)


def run_stages(
    names: Iterable[str], stages: dict[str, Stage], out: Path, dry_run: bool, seconds: float
) -> int:
    """One after the other within `seconds` altogether: 0 when no stage failed, else 1."""
    out.mkdir(parents=True, exist_ok=True)
    summary, failed = [], False
    deadline = time.monotonic() + seconds
    for name in names:
        print(f"== {name}", flush=True)
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            summary.append(f"-- {name}: not started, {left:.0f} s left")
            failed = True
            continue
        stage = replace(stages[name], seconds=min(stages[name].seconds, left))
        report = RunningStage(name, stage, out, dry_run).finish()
        show(report)
        summary.append(f"-- {name}: {ending(report)}")
        failed |= report["status"] == FAILED
    print("\n".join(summary))
    return int(failed)
