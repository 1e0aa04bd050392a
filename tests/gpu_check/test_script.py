"""tools/gpu_check.sh without a GPU: the script, its stages, and that a wrong layout is noticed."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_check import command, env, layout, runner
from gpu_check.report import Context, python_path
from probes import library as probe_library
from probes import nvcc
from probes import sources as probe_sources
from probes import worker as probe_worker
from repository import ROOT
from visits import run_script

from bench import machine

PTX = ROOT / "csrc" / "cuda" / "ptx"
STAGES = ("env", "build", "layout")
needs_nvcc = pytest.mark.skipif(
    machine.find_nvcc() is None, reason="nvcc is not on this machine: nothing can be compiled"
)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first stages, once: the script's result and its JSON files by stage."""
    out = tmp_path_factory.mktemp("gpu_check")
    done = run_script("--dry-run", str(out), *STAGES)
    reports = {path.name: json.loads(path.read_text()) for path in out.iterdir()}
    return {"done": done, "reports": reports}


@needs_nvcc
def test_dry_run_ends_well_and_claims_nothing(dry_run: dict[str, Any]) -> None:
    done = dry_run["done"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(dry_run["reports"]) == {f"{name}.json" for name in STAGES}
    for name in STAGES:
        report = dry_run["reports"][f"{name}.json"]
        assert report["stage"] == name
        assert report["status"] == "not measured"
        assert report["dry_run"] is True
        assert set(report) == {
            *("stage", "status", "reason", "dry_run", "machine", "versions", "commit"),
            *("sources", "started", "seconds", "data", "table"),
        }
        assert f"-- {name}: not measured" in done.stdout
    assert dry_run["reports"]["env.json"]["versions"]["nvcc"]


@needs_nvcc
def test_probes_compile_without_spills_or_serialised_wgmma(dry_run: dict[str, Any]) -> None:
    data = dry_run["reports"]["layout.json"]["data"]
    assert {one["source"] for one in data["compilations"]} == {
        one.name for one in probe_sources.SOURCES
    }
    for one in data["compilations"]:
        assert one["complaints"] == []  # spills, stack, C75xx, missing PTX instructions
        assert len(one["kernels"]) > 0
    assert sum(len(one["kernels"]) for one in data["compilations"]) > 30
    assert {probe["name"] for probe in data["probes"]} == {one.name for one in probe_worker.PROBES}


def test_unknown_stage_names_the_known_ones(tmp_path: Path) -> None:
    done = run_script("--dry-run", str(tmp_path / "out"), "env", "nosuch")
    assert done.returncode == 2
    assert "unknown stage nosuch; the stages are env, build, layout" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_stage_is_documented_and_fits_a_slot() -> None:
    text = (ROOT / "docs" / "gpu-check.md").read_text()
    for name, stage in runner.STAGES.items():
        assert f"`{name}`" in text
        assert stage.seconds < 600


def test_no_stage_starts_when_the_time_is_up(tmp_path: Path) -> None:
    done = run_script("--dry-run", "--seconds", "5", str(tmp_path), "env", "build")
    assert done.returncode == 1
    assert "-- env: not started, 5 s left" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_failing_stage_sets_the_exit_status_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT))
    stages = {"broken": runner.Stage("gpu_check.no_such_stage", 60), "env": runner.STAGES["env"]}
    assert command.main(["--dry-run", str(tmp_path)], stages) == 1
    assert json.loads((tmp_path / "broken.json").read_text())["status"] == "failed"
    assert json.loads((tmp_path / "env.json").read_text())["status"] == "not measured"
    assert "no_such_stage" in capsys.readouterr().out


def test_layout_without_library_and_compiler_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_library, "FOLDER", tmp_path / "none")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    outcome = layout.run(Context("layout", tmp_path, dry_run=True, seconds=60))
    assert outcome.status == "failed"
    assert "nvcc not found" in outcome.reason


def test_probes_that_do_not_compile_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = tmp_path / "nvcc"
    refusing.write_text("#!/bin/sh\necho 'no such architecture' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(probe_library, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(machine, "find_nvcc", lambda: str(refusing))
    outcome = layout.run(Context("layout", tmp_path, dry_run=True, seconds=60))
    assert outcome.reason == "the probes do not compile"
    assert "no such architecture" in outcome.table[0]
    assert not (tmp_path / "none").exists()


STUB = """
import time
from gpu_check.report import RUNNING, Outcome

def run(context):
    context.save(Outcome(RUNNING, {"first": 1}, []))
    ACTION
"""


def run_stub(
    action: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    (tmp_path / "stub_stage.py").write_text(STUB.replace("ACTION", action))
    search = os.pathsep.join([str(tmp_path), python_path(ROOT)])
    monkeypatch.setenv("PYTHONPATH", search)
    stages = {"stub": runner.Stage("stub_stage", seconds)}
    assert command.main([str(tmp_path), "--dry-run"], stages) == 1
    return json.loads((tmp_path / "stub.json").read_text())


def test_crash_is_reported_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_stub("raise RuntimeError('broken')", 60, tmp_path, monkeypatch)
    assert report["status"] == "failed"
    assert "exit status 1" in report["reason"]
    assert "RuntimeError: broken" in report["reason"]


def test_stage_over_its_budget_is_stopped_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.time()
    report = run_stub("time.sleep(300)", 4, tmp_path, monkeypatch)
    assert time.time() - started < 60
    assert report["status"] == "failed"
    assert "over its budget of 4 s" in report["reason"]
    assert report["data"] == {"first": 1}


PTXAS_LOG = """
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
ptxas info    : Function properties for _Z4spilv
    64 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
"""


def test_ptxas_log_is_read() -> None:
    kernels, messages = nvcc.parse_ptxas(PTXAS_LOG)
    assert [(one.name, one.registers) for one in kernels] == [("_Z4goodv", 32), ("_Z4spilv", 255)]
    assert len(messages) == 1
    result = nvcc.Compilation("x", 1.0, 0, PTXAS_LOG, kernels, messages, ["elect.sync"])
    complaints = "\n".join(result.complaints)
    assert "_Z4spilv uses local memory" in complaints
    assert "C7510" in complaints
    assert "PTX lacks elect.sync" in complaints
    assert "_Z4goodv" not in complaints


def test_wgmma_headers_are_what_their_generator_writes() -> None:
    sys.path.insert(0, str(PTX))
    try:
        import generate_wgmma
    finally:
        sys.path.remove(str(PTX))
    for ptx_type in generate_wgmma.TAGS:
        written = (PTX / f"wgmma_{ptx_type}.h").read_text()
        wanted = generate_wgmma.header_text(ptx_type)
        assert re.sub(r"\s+", "", written) == re.sub(r"\s+", "", wanted)


def test_every_instruction_wrapper_is_probed() -> None:
    sources = "".join(path.read_text() for path in probe_library.PROBES.iterdir())
    names = set()
    for header in PTX.glob("*.h"):
        names |= set(re.findall(r"__forceinline__ \w+ (\w+)\(", header.read_text()))
    missing = {name for name in names if f"ptx::{name}" not in sources}
    assert len(names) > 40
    assert missing == {"fence_proxy_async_global"}  # for a later kernel that needs it


def test_smi_answer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    values = ["NVIDIA H100 80GB HBM3", "9.0", "580.1", *["1"] * (len(machine.GPU_FIELDS) - 3)]
    tool.write_text(f"#!/bin/sh\necho '{', '.join(values)}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.gpu_fields()["compute_cap"] == "9.0"
    hopper, ampere = "9.0", "8.0"
    served = {one.architecture: one for one in probe_worker.PROBES}
    assert layout.serves(served["sm_90a"], hopper)
    assert layout.serves(served["sm_80"], hopper)
    assert layout.serves(served["sm_80"], ampere)
    assert not layout.serves(served["sm_90a"], ampere)


def test_dead_worker_is_a_failure_with_its_text(tmp_path: Path) -> None:
    probe = probe_worker.PROBES[0]
    result = layout.run_in_worker(tmp_path / "nosuch.so", probe)
    assert "nosuch.so" in result["error"]
    assert layout.verdict(probe, result) == "failed"
    assert layout.verdict(replace(probe, informational=True), result) == "observed"


def test_measuring_without_a_gpu_fails_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpu_fields", dict)
    context = Context("env", tmp_path, dry_run=False, seconds=60)
    outcome = env.run(context)
    assert outcome.status == "failed"
    assert outcome.reason == "nvidia-smi finds no GPU"
