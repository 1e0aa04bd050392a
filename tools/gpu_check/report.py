"""What a stage is given, what it returns, and the JSON file it leaves."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import machine
from bench.machine import ROOT

OK, FAILED, NOT_MEASURED = "ok", "failed", "not measured"
RUNNING = "running"  # only seen in the file of a stage that was stopped


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. table: short lines for people, printed last."""

    status: str
    data: dict[str, Any]
    table: list[str]
    reason: str = ""


@dataclass
class Context:
    """One stage's surroundings. seconds: its budget. only: the jobs it is asked for, or all."""

    name: str
    out: Path
    dry_run: bool
    seconds: float
    started: float = field(default_factory=time.time)
    only: frozenset[str] | None = None

    @property
    def path(self) -> Path:
        return self.out / f"{self.name}.json"

    def remaining(self) -> float:
        return self.seconds - (time.time() - self.started)

    def wants(self, job: str) -> bool:
        return self.only is None or job in self.only

    def save(self, outcome: Outcome) -> None:
        """Writes the stage's file; called again as results come in, so that a stop loses little."""
        write_report(self.path, envelope(self, outcome))


def envelope(context: Context, outcome: Outcome) -> dict[str, Any]:
    return {
        "stage": context.name,
        "status": outcome.status,
        "reason": outcome.reason,
        "dry_run": context.dry_run,
        "machine": machine.description(),
        "versions": machine.versions(),
        "commit": machine.commit(ROOT),
        "sources": machine.source_digest(ROOT),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(context.started)),
        "seconds": round(time.time() - context.started, 2),
        "data": outcome.data,
        "table": outcome.table,
    }


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: those become text, and cost nobody the rest of a report."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Replaces the file in one step: a stage may be stopped while it writes."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plain(report), allow_nan=False) + "\n")
    partial.replace(path)


def python_path(package: Path) -> str:
    """The package first: the root holds one without kernels where it was not built in place."""
    found = (package, ROOT / "tools", ROOT, ROOT / "tests", ROOT / "tests" / "support")
    return os.pathsep.join(map(str, found))
