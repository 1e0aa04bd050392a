"""Results of GPU runs: from the files of `tools/gpu_check.sh` to bench/results, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import machine
from bench.gpu import archive
from bench.gpu.cases import GROUPS, GpuCase
from bench.machine import ROOT

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class GpuResults:
    """What was measured on one GPU; every table has a line for what was not."""

    machine: dict[str, Any]  # gpu, driver, versions, commit, date; empty: nothing was measured
    ceilings: dict[str, Any] | None  # copy bandwidth and matmul rate of the same run
    rows: list[Row]
    launches: dict[str, Row] = field(default_factory=dict)  # by backend: host_us, first_seconds

    def row(self, case: GpuCase, contender: str) -> Row | None:
        """None when it was not asked for; a row without times holds the reason as "error"."""
        key = (case.label, contender)
        return next((x for x in self.rows if (x["case"], x["contender"]) == key), None)


NOTHING = GpuResults({}, None, [])


def all_cases() -> list[GpuCase]:
    """Every case once; the group flex repeats those of quick with another peer."""
    found: dict[str, GpuCase] = {}
    for cases in GROUPS.values():
        found |= {case.label: case for case in cases}
    return list(found.values())


def collect(*paths: Path) -> GpuResults:
    """The bench-*.json of tars and folders as one result; ValueError when they do not fit."""
    found = [one for path in paths for one in archive.read_reports(path).values()]
    found = [one for one in found if not one["dry_run"]]
    reports = [one for one in found if one["stage"].startswith("bench-")]
    reports = [one for one in reports if one["data"].get("ceilings")]
    names = ", ".join(map(str, paths))
    if not reports:
        raise ValueError(f"{names}: expected bench-*.json of a GPU run, found none with numbers")
    # Later rows replace earlier ones: a peer's are those that were timed beside the CUDA kernels.
    reports.sort(key=lambda one: one["stage"] != "bench-triton")
    first = reports[-1]
    reports += [one for one in found if one["stage"] == "launch"]
    sources = {(one["sources"], one["machine"]["gpu"]) for one in reports}
    if len(sources) > 1:
        raise ValueError(f"{names}: expected one GPU and one state of the sources, got {sources}")
    about = {
        **first["machine"],
        "versions": {name: found for name, found in first["versions"].items() if found},
        "commit": commit_of(first),
        "sources": first["sources"],
        "date": first["started"][:10],
        "clocks": {one["stage"]: clocks(one["data"]) for one in reports},
    }
    return GpuResults(about, first["data"]["ceilings"], rows_of(reports), launches_of(reports))


def rows_of(reports: list[dict[str, Any]]) -> list[Row]:
    """One row a case and contender, with the case's shape and the clocks just after it."""
    merged: dict[tuple[str, str], Row] = {}
    for answer in (answer for one in reports for answer in one["data"]["rows"]):
        beside = {key: answer[key] for key in ("shape", "clocks") if key in answer}
        for row in answer.get("rows", []):
            key = (row["case"], row["contender"])
            if key not in merged or "errors" in row:
                merged[key] = row | beside
    return list(merged.values())


def launches_of(reports: list[dict[str, Any]]) -> dict[str, Row]:
    """What stage launch found, by backend."""
    found: dict[str, Row] = {}
    for row in (row for one in reports if one["stage"] == "launch" for row in one["data"]["rows"]):
        measured = {key: row[key] for key in ("host_us", "first_seconds") if key in row}
        found.setdefault(row["job"].split()[-1], {}).update(measured)
    return found


def clocks(data: dict[str, Any]) -> dict[str, dict[str, str]]:
    """nvidia-smi's clocks, power and temperature before and after one stage."""
    moments = {"before": data.get("gpu_before", {}), "after": data.get("gpu_after", {})}
    return {moment: machine.clocks_of(fields) for moment, fields in moments.items()}


def commit_of(report: dict[str, Any]) -> str:
    """The run's own, or this tree's when the run had no git but the very same sources."""
    if report["commit"] != "unknown":
        return str(report["commit"])
    same = machine.source_digest(ROOT) == report["sources"]
    return machine.commit(ROOT) if same else f"sources-{report['sources']}"


def save(results: GpuResults, folder: Path = RESULTS) -> Path:
    """Writes <gpu>-<date>-<commit>.json."""
    about = results.machine
    gpu = "".join(c if c.isalnum() else "-" for c in str(about["gpu"]).lower()).strip("-")
    commit = str(about["commit"])
    short = commit if commit.startswith("sources-") else commit[:12]
    changed = "-changed" if commit.endswith("+changes") else ""
    path = folder / f"{gpu}-{about['date']}-{short}{changed}.json"
    folder.mkdir(parents=True, exist_ok=True)
    written = {"machine": about, "ceilings": results.ceilings, "rows": results.rows}
    written["launches"] = results.launches
    path.write_text(json.dumps(written, indent=1) + "\n")
    return path


def newest(folder: Path = RESULTS) -> GpuResults:
    """The last GPU results of the folder by date; NOTHING where there are none."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [one for one in found if one["machine"].get("gpu")]
    if not found:
        return NOTHING
    last = max(found, key=lambda one: str(one["machine"]["date"]))
    return GpuResults(last["machine"], last["ceilings"], last["rows"], last.get("launches", {}))
