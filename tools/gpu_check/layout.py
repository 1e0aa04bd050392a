"""Stage layout: every ptx/ wrapper and every layout assumption against the hardware."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import machine
from .nvcc import SM_80, SM_90A, Compilation, Source, compile_all, link, sass_counts
from .probe import Probe
from .probe_worker import PROBES
from .report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome

FOLDER = Path(__file__).parent / "probes"
PROBE_SECONDS = 60  # one probe; a hung kernel ends with its process
SM80_GEMM = ("cp.async.cg.shared.global", "ldmatrix.sync", "mma.sync.aligned.m16n8k16")
SOURCES = (
    Source(
        "sm80",
        SM_80,
        (
            "cp.async.cg.shared.global [",
            "cp.async.commit_group",
            "cp.async.wait_group",
            "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
            "ex2.approx.ftz.f32",
            "cvt.rn.bf16x2.f32",
            "cvt.rn.f16x2.f32",
            "cvt.f32.f16",
            "red.global.add.f32",
            "bar.sync",
            "bar.arrive",
        ),
    ),
    Source("gemm_sm80", SM_80, SM80_GEMM),
    Source(
        "sm90_copy",
        SM_90A,
        (
            *(f"stmatrix.sync.aligned.m8n8.{x}.shared.b16" for x in ("x2", "x4")),
            *(f"stmatrix.sync.aligned.m8n8.{x}.trans.shared.b16" for x in ("x2", "x4")),
            "mbarrier.init.shared::cta.b64",
            "mbarrier.arrive.shared::cta.b64",
            "mbarrier.arrive.expect_tx.shared::cta.b64",
            "mbarrier.expect_tx.relaxed.cta.shared::cta.b64",
            "mbarrier.try_wait.parity.shared::cta.b64",
            "mbarrier.test_wait.parity.shared::cta.b64",
            "fence.mbarrier_init.release.cluster",
            "fence.proxy.async.shared::cta",
            "elect.sync",
            "prefetch.tensormap",
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
            "cp.async.bulk.global.shared::cta.bulk_group",
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32",
            *(f"red.global.add.v{width}.f32" for width in (2, 4)),
            "cp.async.bulk.commit_group",
            "cp.async.bulk.wait_group 0",
            "cp.async.bulk.wait_group.read",
            *(f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile" for rank in (2, 3, 4)),
            *(f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile" for rank in (2, 3, 4)),
            *(f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta" for rank in (2, 3, 4)),
        ),
    ),
    Source(
        "sm90_wgmma",
        SM_90A,
        (
            "wgmma.fence.sync.aligned",
            "wgmma.commit_group.sync.aligned",
            "wgmma.wait_group.sync.aligned",
            *(f"m64n{n}k16.f32.bf16.bf16" for n in (64, 80, 96, 128, 176, 192, 256)),
            *(f"m64n{n}k16.f32.f16.f16" for n in (64, 128)),
        ),
    ),
    Source(
        "gemm_sm90",
        SM_90A,
        ("setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32", "m64n128k16"),
    ),
)


def serves(probe: Probe, compute_capability: str | None) -> bool:
    """sm_80 code runs on 8.0 and later, sm_90a code on 9.0 alone."""
    if compute_capability is None:
        return False
    return probe.architecture == "sm_80" or compute_capability == "9.0"


def run_in_worker(library: Path, probe: Probe) -> dict[str, Any]:
    """One probe in its own process; {"error": ...} when it ends without an answer."""
    command = [sys.executable, "-m", "gpu_check.probe_worker", str(library), probe.name]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS} s"}
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


def compile_data(compilations: list[Compilation]) -> list[dict[str, Any]]:
    return [
        {
            "source": one.source,
            "seconds": one.seconds,
            "kernels": [asdict(kernel) for kernel in one.kernels],
            "complaints": one.complaints,
        }
        for one in compilations
    ]


def run(context: Context) -> Outcome:
    nvcc = machine.find_nvcc()
    if nvcc is None:
        return Outcome(FAILED, {}, [], "nvcc not found: neither CUDA_HOME nor PATH names one")
    with tempfile.TemporaryDirectory(prefix="drope_layout_") as folder:
        work = Path(folder)
        jobs = min(len(SOURCES), os.cpu_count() or 1)
        compilations = compile_all(nvcc, FOLDER, SOURCES, work, jobs)
        complaints = [text for one in compilations for text in one.complaints]
        num_kernels = sum(len(one.kernels) for one in compilations)
        data: dict[str, Any] = {"compilations": compile_data(compilations), "probes": []}
        table = [f"{num_kernels} kernels compiled, {len(complaints)} complaints", *complaints]
        if any(one.returncode for one in compilations):
            return Outcome(FAILED, data, table, "the probes do not compile")
        library = link(nvcc, SOURCES, work)
        data["sass"] = sass_counts(library)
        capability = None if context.dry_run else machine.gpu_fields().get("compute_cap")
        for probe in PROBES:
            entry = describe(probe, NOT_MEASURED)
            if serves(probe, capability):
                entry["result"] = run_in_worker(library, probe)
                entry["status"] = verdict(probe, entry["result"])
            data["probes"].append(entry)
            context.save(Outcome(RUNNING, data, table))
    table += [table_line(entry) for entry in data["probes"]]
    statuses = {entry["status"] for entry in data["probes"]}
    if FAILED in statuses or complaints:
        return Outcome(FAILED, data, table, "see the probes that failed")
    if not context.dry_run and capability is None:
        return Outcome(FAILED, data, table, "nvidia-smi finds no GPU")
    return Outcome(NOT_MEASURED if NOT_MEASURED in statuses else OK, data, table)
