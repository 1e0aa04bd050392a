"""Stage layout: every ptx/ wrapper and every layout assumption against the hardware."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from probes import library as probe_library
from probes.library import ProbeLibrary, ProbesDoNotCompileError
from probes.probe import Probe
from probes.worker import PROBES

from bench import machine
from bench.machine import ROOT
from gpu_check.report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome, python_path

PROBE_SECONDS = 30.0  # one probe; a hung kernel ends with its process
LEAST_SECONDS = 3.0  # no probe is started for less
MOST_AT_A_TIME = 8  # a probe is a moment of the GPU and much of starting a process


def serves(probe: Probe, compute_capability: str | None) -> bool:
    """sm_80 code runs on 8.0 and later, sm_90a code on 9.0 alone."""
    if compute_capability is None:
        return False
    return probe.architecture == "sm_80" or compute_capability == "9.0"


def run_in_worker(library: Path, probe: Probe, seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """One probe in its own process; {"error": ...} when it ends without an answer."""
    command = [sys.executable, "-m", "probes.worker", str(library), probe.name]
    environment = os.environ | {"PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:.0f} s"}
    if done.returncode != 0:
        return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-600:]}"}
    return {"comparisons": json.loads(done.stdout)}


def verdict(probe: Probe, result: dict[str, Any]) -> str:
    if "error" in result:
        return "observed" if probe.informational else FAILED
    wrong = any(one["num_wrong"] for one in result["comparisons"])
    if probe.informational:
        return "observed"
    return FAILED if wrong else OK


def describe(probe: Probe, status: str) -> dict[str, Any]:
    return {
        "name": probe.name,
        "status": status,
        "question": probe.question,
        "expectation": probe.expectation,
        "source": f"PTX ISA, {probe.source}",
        "architecture": probe.architecture,
        "num_cases": len(probe.cases()),
    }


def table_line(entry: dict[str, Any]) -> str:
    result = entry.get("result", {})
    wrong = sum(bool(one["num_wrong"]) for one in result.get("comparisons", []))
    note = result["error"].splitlines()[-1] if "error" in result else f"{wrong} wrong"
    shown = "" if entry["status"] == NOT_MEASURED else f", {note}"
    return f"{entry['name']:26} {entry['num_cases']:3} cases  {entry['status']}{shown}"


def answer(library: Path, probe: Probe, capability: str | None, left: float) -> dict[str, Any]:
    """The probe's entry in the report: not measured where the GPU has no such instructions."""
    if not serves(probe, capability):
        return describe(probe, NOT_MEASURED)
    if left < LEAST_SECONDS:
        entry = describe(probe, FAILED)
        return entry | {"result": {"error": "not reached in time"}}
    result = run_in_worker(library, probe, min(PROBE_SECONDS, left - 1))
    return describe(probe, verdict(probe, result)) | {"result": result}


def answer_all(
    library: Path, probes: list[Probe], context: Context, save: Callable[[list[Any]], None]
) -> list[dict[str, Any]]:
    """Several at a time, each saved as it comes; in the order of `probes`."""
    capability = None if context.dry_run else machine.gpu_fields().get("compute_cap")
    come: dict[str, dict[str, Any]] = {}
    writing = threading.Lock()

    def ask(probe: Probe) -> None:
        entry = answer(library, probe, capability, context.remaining())
        with writing:
            come[probe.name] = entry
            save(list(come.values()))

    with ThreadPoolExecutor(min(MOST_AT_A_TIME, os.cpu_count() or 1)) as threads:
        list(threads.map(ask, probes))  # raises what a thread raised
    return [come[probe.name] for probe in probes]


def find_library() -> ProbeLibrary | str:
    """The library, or why there is none."""
    found = probe_library.find(probe_library.FOLDER)
    if found is not None:
        return found
    nvcc = machine.find_nvcc()
    if nvcc is None:
        return "nvcc not found: neither CUDA_HOME nor PATH names one, and no library was carried"
    return probe_library.make(nvcc, probe_library.FOLDER)


def run(context: Context) -> Outcome:
    try:
        library = find_library()
    except ProbesDoNotCompileError as error:
        return Outcome(FAILED, error.facts, error.facts["complaints"], str(error))
    if isinstance(library, str):
        return Outcome(FAILED, {}, [], library)
    table = [f"{library.num_kernels} kernels, {len(library.complaints)} complaints of the compiler"]
    table += library.complaints
    chosen = [probe for probe in PROBES if context.wants(probe.name)]
    planned = [probe.name for probe in chosen]
    data: dict[str, Any] = {**library.facts, "planned": planned, "probes": []}

    def save(entries: list[dict[str, Any]]) -> None:
        context.save(Outcome(RUNNING, data | {"probes": entries}, table))

    data["probes"] = answer_all(library.path, chosen, context, save)
    table += [table_line(entry) for entry in data["probes"]]
    statuses = {entry["status"] for entry in data["probes"]}
    if FAILED in statuses or library.complaints:
        return Outcome(FAILED, data, table, "see the probes that failed")
    if not context.dry_run and not machine.gpu_fields():
        return Outcome(FAILED, data, table, "nvidia-smi finds no GPU")
    return Outcome(NOT_MEASURED if NOT_MEASURED in statuses else OK, data, table)
