"""A visit of the GPU: its stages by worth, within its seconds, its results in one tar."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from bench import machine
from bench.gpu.archive import Archive
from gpu_check.report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome
from gpu_check.runner import RunningStage, Stage, ending, show
from gpu_check.visit import limits
from gpu_check.visit.carried import unpack
from gpu_check.visit.plan import PROBES, TAR, Step, Task, Visit

RENEW_SECONDS = 20.0  # how old the tar may be while a long stage runs
Stages = dict[str, Stage]


class Conductor:
    """One visit. `lines`: a line for each stage, of how it ended or why it did not begin."""

    def __init__(
        self, visit: Visit, stages: Stages, out: Path, folder: Path, dry_run: bool
    ) -> None:
        self.visit, self.stages, self.folder, self.dry_run = visit, stages, folder, dry_run
        # A dry run is as slow as its machine: its clock was printed, and is another's.
        seconds = math.inf if dry_run else visit.budget - TAR.estimate
        self.deadline = time.monotonic() + seconds
        name = f"visit-{visit.number}"
        self.context = Context("visit", folder, dry_run, visit.budget)
        order = [task.step.stage for task in visit.tasks]
        self.archive = Archive(out / f"{name}.tar.gz", folder, order, limits.RESULT_BYTES)
        self.data: dict[str, Any] = {
            "visit": visit.number,
            "said": [],
            "stages": [],
            "left_out": [],
        }
        self.building: RunningStage | None = None
        self.built, self.failed, self.compiles_probes = True, False, False

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.data["said"].append(text)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self, status: str = RUNNING) -> None:
        """The visit's own report, then the tar; again when the tar had to leave something out."""
        for _ in range(2):
            self.context.save(Outcome(status, self.data, self.lines()))
            self.archive.renew()
            if self.data["left_out"] == self.archive.left_out:
                return
            self.data["left_out"] = list(self.archive.left_out)

    def lines(self) -> list[str]:
        found = [f"-- {one['stage']}: {one['ending']}" for one in self.data["stages"]]
        if self.data["left_out"]:
            names = ", ".join(self.data["left_out"])
            found.append(f"left out of the tar, over {limits.RESULT_BYTES >> 20} MiB: {names}")
        return found

    def start(self, carried: Path | None) -> bool:
        """Says what machine this is; the package into place, or its build into the background."""
        gpu = machine.gpu_fields()
        self.say(f"{gpu.get('name', 'no GPU')}, {os.cpu_count()} cores, kernel {machine.runtime()}")
        self.say(machine.what_applies(gpu.get("compute_cap")))
        if not gpu and not self.dry_run:
            self.say("nvidia-smi finds no GPU: nothing is run")
            return False
        unpacked = unpack(carried)
        self.compiles_probes = bool(unpacked.probes)
        self.say(f"probes: {unpacked.probes or 'in place'}")
        self.say(f"package: {unpacked.package or 'in place'}")
        if unpacked.package and not self.dry_run:
            stage = replace(self.stages["build"], seconds=max(1.0, self.left()))
            self.building = RunningStage("build", stage, self.folder, self.dry_run)
            self.say("the package is built in the background")
        return True

    def run(self, carried: Path | None) -> int:
        """0 when every stage of the plan ran and none failed."""
        ended = False
        try:
            self.failed = not self.start(carried)
            for task in () if self.failed else self.visit.tasks:
                self.take(task)
                self.save()
            ended = True
        finally:
            if self.building is not None:
                self.building.kill()
            if not ended:
                self.note("visit", "ended from outside", failed=True)
            self.save(FAILED if self.failed else NOT_MEASURED if self.dry_run else OK)
            print("\n".join(self.lines()))
            print(f"results: {self.archive.path}", flush=True)
        return int(self.failed)

    def take(self, task: Task) -> None:
        step = task.step
        print(f"== {step.stage}, at most {step.cap:.0f} s: {step.answers}", flush=True)
        if step.needs_package and not self.wait_for_package(step.least):
            self.note(step.stage, "not started: the package is not there", failed=True)
            return
        seconds = min(self.cap(step), self.left())
        if seconds < step.least:
            text = f"not started, {self.left():.0f} s left of which it needs {step.least:.0f}"
            self.note(step.stage, text, failed=not step.spare)
            return
        stage = replace(self.stages[step.stage], seconds=seconds)
        running = RunningStage(step.stage, stage, self.folder, self.dry_run, task.only)
        report = running.finish(self.save, RENEW_SECONDS)
        show(report)
        self.note(step.stage, ending(report), failed=report["status"] == FAILED)

    def cap(self, step: Step) -> float:
        if self.dry_run:
            return self.stages[step.stage].seconds
        compiles = step.stage == "layout" and self.compiles_probes
        return step.cap + (PROBES.estimate if compiles else 0)

    def note(self, stage: str, ending: str, *, failed: bool) -> None:
        second = round(time.time() - self.context.started, 1)
        self.data["stages"].append({"stage": stage, "ending": ending, "ended_at": second})
        self.failed |= failed

    def wait_for_package(self, least: float) -> bool:
        """Whether the package is there, once its build ended; no longer than leaves `least`."""
        if self.building is None:
            return self.built
        while self.building.running() and self.left() > least:
            time.sleep(0.2)
        if self.building.running():
            return False
        report = self.building.finish()
        self.building = None
        show(report)
        self.built = report["status"] != FAILED
        self.note("build", ending(report), failed=not self.built)
        return self.built


class StoppedError(SystemExit):
    """SIGTERM: what was saved stays, stages end with the visit."""


def stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError(128 + number)


def run(visit: Visit, stages: Stages, out: Path, carried: Path | None, dry_run: bool) -> int:
    """The visit; its exit status."""
    out.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with tempfile.TemporaryDirectory(prefix="drope_visit_") as temporary:
            folder = Path(temporary) / f"visit-{visit.number}"
            folder.mkdir()
            return Conductor(visit, stages, out, folder, dry_run).run(carried)
    finally:
        signal.signal(signal.SIGTERM, before)
