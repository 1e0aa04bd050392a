"""Results of GPU runs: from the files of `tools/gpu_check.sh` to bench/results, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check import machine
from gpu_check.bench_cases import GROUPS, GpuCase
from gpu_check.report import ROOT

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


def collect(folder: Path) -> GpuResults:
    """The bench-*.json of one folder as one result; ValueError when they do not fit together."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [one for one in found if not one["dry_run"]]
    reports = [one for one in found if one["stage"].startswith("bench-")]
    reports = [one for one in reports if one["data"].get("ceilings")]
    if not reports:
        raise ValueError(f"{folder}: expected bench-*.json of a GPU run, found none with numbers")
    reports += [one for one in found if one["stage"] == "launch"]
    sources = {(one["sources"], one["machine"]["gpu"]) for one in reports}
    if len(sources) > 1:
        raise ValueError(f"{folder}: expected one GPU and one state of the sources, got {sources}")
    first = reports[0]
    about = {
        **first["machine"],
        "versions": {name: found for name, found in first["versions"].items() if found},
        "commit": commit_of(first),
        "sources": first["sources"],
        "date": first["started"][:10],
        "clocks": {one["stage"]: clocks(one["data"]) for one in reports},
    }
    merged: dict[tuple[str, str], Row] = {}
    for answer in (answer for one in reports for answer in one["data"]["rows"]):
        for row in answer.get("rows", []):
            key = (row["case"], row["contender"])
            if key not in merged or "errors" in row:
                merged[key] = row | {"shape": answer["shape"]}
    rows = list(merged.values())
    return GpuResults(about, first["data"]["ceilings"], rows, launches_of(reports))


def launches_of(reports: list[dict[str, Any]]) -> dict[str, Row]:
    """What stage launch found, by backend."""
    found: dict[str, Row] = {}
    for row in (row for one in reports if one["stage"] == "launch" for row in one["data"]["rows"]):
        measured = {key: row[key] for key in ("host_us", "first_seconds") if key in row}
        found.setdefault(row["job"].split()[-1], {}).update(measured)
    return found


def clocks(data: dict[str, Any]) -> dict[str, dict[str, str]]:
    """nvidia-smi's clocks, power and temperature before and after one stage."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    moments = {"before": data.get("gpu_before", {}), "after": data.get("gpu_after", {})}
    return {
        moment: {name: fields[name] for name in names if name in fields}
        for moment, fields in moments.items()
    }


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
