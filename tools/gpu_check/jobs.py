"""What the stages that run jobs have in common: workers, one row a job, saved as they come."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from bench import machine
from gpu_check import package
from gpu_check.report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome
from gpu_check.worker import Worker

MOST_RESERVED = 15.0  # seconds: nothing new is started when less is left, of a short stage a tenth
MOST_HUNG = 2  # jobs of one kind, their first word: a backend's others would hang as long


class JobRun:
    """Asks the workers of `module` for one job after another, within the stage's time.

    num_workers: more than one where jobs spend their time compiling, and none is timed.
    data["planned"]: what was asked for; "rows": {"job": name, "seconds": s, ...} of each that was
    done; "unreached": those out of time, and those of a kind that hangs.
    `blocked` says why nothing can run here, or is empty.
    """

    def __init__(
        self, context: Context, module: str, job_seconds: float, num_workers: int = 1
    ) -> None:
        self.context, self.job_seconds = context, job_seconds
        self.mode = "dry-run" if context.dry_run else "measure"
        self.data: dict[str, Any] = {"planned": [], "rows": [], "unreached": [], "builds": []}
        self.reserve = min(MOST_RESERVED, context.seconds / 10)
        self.num_workers = num_workers
        self.workers: list[Worker] = []
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        self.writing = threading.Lock()
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
        for _ in range(self.num_workers):
            self.workers.append(Worker(self.module, self.mode, built.folder, self.num_workers))
            self.idle.put(self.workers[-1])
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.close()
        if self.workers:
            self.data["gpu_after"] = self.gpu_fields()

    def ask(self, name: str) -> dict[str, Any] | None:
        """The job's row; None when there is no time left for it."""
        context = self.context
        if context.remaining() < self.reserve:
            self.data["unreached"].append(name)
            return None
        assert self.workers, "entered and not blocked"
        worker = self.idle.get()
        try:
            seconds = min(self.job_seconds, context.remaining() - self.reserve / 2)
            row = {"job": name, **worker.ask(name, seconds)}
        finally:
            self.idle.put(worker)
        with self.writing:
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
        """Those that the stage was asked for, in this order; several workers end them in any."""
        chosen = [name for name in names if self.context.wants(name)]
        self.data["planned"] += chosen

        def ask(name: str) -> None:
            if self.hangs(name.split()[0]):
                self.data["unreached"].append(name)
            else:
                self.ask(name)

        with ThreadPoolExecutor(self.num_workers) as threads:
            list(threads.map(ask, chosen))  # raises what a thread raised

    def hangs(self, kind: str) -> bool:
        done = list(self.rows)
        hung = [row for row in done if row.get("hung") and row["job"].split()[0] == kind]
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
