"""What the stages that run jobs have in common: one worker, one row a job, saved as they come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import machine, package
from .report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome
from .worker import Worker

RESERVE_SECONDS = 15.0  # nothing new is started when less is left
MOST_HUNG = 2  # jobs of one kind, their first word: a backend's others would hang as long


class JobRun:
    """Asks the worker of gpu_check.`module` for one job after another, within the stage's time.

    data["rows"]: {"job": name, "seconds": s, ...} of each; "unreached": those out of time, and
    those of a kind that hangs.
    `blocked` says why nothing can run here, or is empty.
    """

    def __init__(self, context: Context, module: str, job_seconds: float) -> None:
        self.context, self.job_seconds = context, job_seconds
        self.mode = "dry-run" if context.dry_run else "measure"
        self.data: dict[str, Any] = {"rows": [], "unreached": [], "builds": []}
        self.worker: Worker | None = None
        self.blocked, self.module = "", module

    def gpu_fields(self) -> dict[str, str]:
        return {} if self.context.dry_run else machine.gpu_fields()

    def __enter__(self) -> JobRun:
        self.data["gpu_before"] = self.gpu_fields()
        if not self.context.dry_run and not self.data["gpu_before"]:
            self.blocked = "nvidia-smi finds no GPU"
            return self
        built = package.find_or_build(self.context)
        self.data["builds"], self.blocked = built.builds, built.error
        self.worker = Worker(f"gpu_check.{self.module}", self.mode, built.folder)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.worker is not None:
            self.worker.close()
            self.data["gpu_after"] = self.gpu_fields()

    def ask(self, name: str) -> dict[str, Any] | None:
        """The job's row; None when there is no time left for it."""
        context = self.context
        if context.remaining() < RESERVE_SECONDS:
            self.data["unreached"].append(name)
            return None
        assert self.worker is not None, "entered and not blocked"
        seconds = min(self.job_seconds, context.remaining() - RESERVE_SECONDS / 2)
        row = {"job": name, **self.worker.ask(name, seconds)}
        self.data["rows"].append(row)
        context.save(Outcome(RUNNING, self.data, []))
        return row

    def opening(self, name: str) -> dict[str, Any]:
        """What the worker says there is to do; empty, its error among the rows, when it cannot."""
        answer = None if self.blocked else self.ask(name)
        if answer is None or "error" in answer:
            return {}
        self.rows.remove(answer)
        return answer

    def ask_all(self, names: Iterable[str]) -> None:
        for name in names:
            if self.hangs(name.split()[0]):
                self.data["unreached"].append(name)
            else:
                self.ask(name)

    def hangs(self, kind: str) -> bool:
        hung = [row for row in self.rows if row.get("hung") and row["job"].split()[0] == kind]
        return len(hung) >= MOST_HUNG

    def outcome(self, table: list[str]) -> Outcome:
        """Failed when a job failed, was not reached, or none could run."""
        if self.blocked:
            return Outcome(FAILED, self.data, [], self.blocked)
        table = [*table, *self.failure_lines()]
        if self.failures or self.data["unreached"]:
            return Outcome(FAILED, self.data, table, "see the jobs that failed or had no time")
        if self.context.dry_run:
            return Outcome(NOT_MEASURED, self.data, table, "dry run: the CPU stood in for the GPU")
        return Outcome(OK, self.data, table)

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.data["rows"]
        return rows

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "error" in row]

    def failure_lines(self, most: int = 12) -> list[str]:
        """One line a failed job, then what was not reached."""
        lines = [f"FAILED {row['job']}: {row['error'].splitlines()[-1]}" for row in self.failures]
        lines = [line[:160] for line in lines[:most]] + (
            [f"and {len(lines) - most} more failures"] if len(lines) > most else []
        )
        if self.data["unreached"]:
            lines.append(f"{len(self.data['unreached'])} not reached in time")
        return lines
