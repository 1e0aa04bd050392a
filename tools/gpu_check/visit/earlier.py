"""What an earlier visit left: the jobs that failed, and those it did not reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.gpu.cases import is_ours
from gpu_check.report import FAILED

Reports = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Unfinished:
    """share: of the stage's jobs. jobs: their names; None for the whole stage."""

    share: float
    jobs: frozenset[str] | None


def ended_well(row: dict[str, Any]) -> bool:
    """A job, a probe, or a benchmark whose contenders of ours all have numbers."""
    if "error" in row or row.get("status") == FAILED:
        return False
    return not any(is_ours(one) and "error" in one for one in row.get("rows", []))


def is_finished(report: dict[str, Any] | None) -> bool:
    return report is not None and report["status"] != FAILED


def unfinished(report: dict[str, Any]) -> Unfinished:
    """Of a stage that began: all of it where it did not come to say what its jobs are."""
    planned = report["data"].get("planned", [])
    if not planned:
        return Unfinished(0, frozenset()) if is_finished(report) else Unfinished(1, None)
    rows = [*report["data"].get("rows", []), *report["data"].get("probes", [])]
    good = {row.get("job", row.get("name")) for row in rows if ended_well(row)}
    left = frozenset(name for name in planned if name not in good)
    return Unfinished(len(left) / len(planned), left)
