"""The GPU check's later stages without a GPU: they run dry, and what is wrong is noticed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from device import named_cases, stress_checks, target
from gpu_check import profiling, sanitizer, watched
from gpu_check.package import Package
from gpu_check.report import Context
from repository import ROOT
from torch import Tensor
from visits import run_script

from bench.gpu import archive, small_calls
from bench.gpu.accelerator import StandIn
from bench.machine import find_nvcc
from drope_kernels.backends import reference
from drope_kernels.call import dispatch

FIRST = (*("layout", "env", "cases", "bench-cuda", "cases-triton", "ahead-triton", "bench-triton"),)
SECOND = ("cases", "sanitizer", "train", "stress", "bench-decode", "launch", "profile")
FAILED_JOB = "reference bfloat16 free regular"
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not on this machine")


def dry_visit(out: Path, *arguments: str) -> dict[str, Any]:
    """The reports in the tar of a visit whose stages run dry, in however long a time."""
    done = run_script("--dry-run", "--seconds", "9999", *arguments, str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (tar,) = out.iterdir()
    assert tar.name.endswith(".tar.gz")
    return archive.read_reports(tar)


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Both visits; of the first, one case is said to have failed."""
    out = tmp_path_factory.mktemp("gpu_visits")
    first = dry_visit(out / "1", "--visit", "1")
    folder = out / "failed"
    folder.mkdir()
    for name, report in copy.deepcopy(first).items():
        for row in report["data"].get("rows", []) if name == "cases" else []:
            if row["job"] == FAILED_JOB:
                row["error"] = "MismatchError: dq"
                report["status"] = "failed"
        (folder / f"{name}.json").write_text(json.dumps(report))
    second = dry_visit(out / "2", "--visit", "2", "--after", str(folder))
    return {"first": first, "second": second}


@needs_nvcc
@pytest.mark.parametrize(
    ("visit", "stage"),
    [*(("first", stage) for stage in FIRST), *(("second", stage) for stage in SECOND)],
)
def test_dry_run_does_everything_and_claims_nothing(
    visit: str, stage: str, visits: dict[str, dict[str, Any]]
) -> None:
    assert set(visits[visit]) == {"visit", *(FIRST if visit == "first" else SECOND)}
    report = visits[visit][stage]
    assert report["status"] == "not measured"
    if stage in ("layout", "env"):
        return
    assert report["data"]["rows"]
    for row in report["data"]["rows"]:
        assert "error" not in row


@needs_nvcc
def test_dry_run_reaches_the_logic_of_each_stage(visits: dict[str, dict[str, Any]]) -> None:
    first, second = visits["first"], visits["second"]
    for stage in ("cases", "cases-triton"):
        names = {row["job"].split(maxsplit=3)[-1] for row in first[stage]["data"]["rows"]}
        assert {"regular", "packed_rope", "decode_pages_rotated", "foreign_decode"} <= names
    assert [row["job"] for row in second["cases"]["data"]["rows"]] == [FAILED_JOB]
    for row in first["ahead-triton"]["data"]["rows"]:
        assert "ahead of" in row["job"]
    checks = {row["job"].split()[-1] for row in second["stress"]["data"]["rows"]}
    assert checks == set(stress_checks.CHECKS)
    for answer in first["bench-cuda"]["data"]["rows"]:
        ours = answer["rows"][0]
        assert ours["contender"] == "reference"
        assert {"errors", "forward"} <= set(ours)
    (row,) = second["train"]["data"]["rows"]
    assert row["dropped"]["tokens_per_second"] > 0
    launches = {row["job"]: row for row in second["launch"]["data"]["rows"]}
    assert set(launches["steady reference"]["host_us"]) == set(small_calls.NAMES)
    assert "steady sdpa" in launches
    runs = launches["first reference"]["first_seconds"]
    assert set(runs) == {"cold", "warm"}
    assert set(small_calls.NAMES) < set(runs["cold"])


# ---- wrong backends are noticed


class Wrong:
    """The reference with one fault in its forward."""

    unavailable = staticmethod(lambda: None)
    supports = staticmethod(reference.supports)
    served_by = staticmethod(reference.served_by)
    repeated = staticmethod(reference.repeated)
    backward = staticmethod(reference.backward)

    def __init__(self, name: str, fault: Any) -> None:
        self.NAME, self.fault, self.calls = name, fault, 0

    def decode(self, inputs: Any) -> tuple[Tensor, ...]:
        return reference.append_and_attend(inputs, self.forward)

    def forward(self, inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        out, *rest = reference.forward(inputs, **options)
        self.calls += 1
        return self.fault(out, self.calls), *rest


FAULTS = {
    "scaled": lambda out, calls: out * 1.02,
    "sometimes": lambda out, calls: out * (1.01 if calls % 3 == 0 else 1.0),
    "unwritten": lambda out, calls: torch.where(out == out.max(), torch.nan, out),
    "near_only": lambda out, calls: out * (torch.arange(out.shape[2])[:, None] < 256),
    "few_rows": lambda out, calls: out * (torch.arange(len(out)) < 40)[:, None, None, None],
}


@pytest.fixture
def wrong(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = request.param
    monkeypatch.setattr(dispatch, "_registered", {})
    dispatch.register(Wrong(name, FAULTS[name]))  # type: ignore[arg-type]
    return name


@pytest.mark.parametrize("wrong", ["scaled", "unwritten"], indirect=True)
def test_wrong_results_fail_their_case(wrong: str) -> None:
    for name in ("regular", "rope_gqa", "decode"):
        with pytest.raises(AssertionError):
            named_cases.run_job(f"{wrong} bfloat16 free {name}", StandIn())


@pytest.mark.parametrize("wrong", ["sometimes"], indirect=True)
def test_results_that_change_are_noticed(wrong: str) -> None:
    for name in ("forward_repeats_rope", "backward_repeats_causal_gqa", "two_streams"):
        with pytest.raises(AssertionError, match="differs in"):
            stress_checks.run_job(f"{wrong} {name}", StandIn())


@pytest.mark.parametrize(
    ("wrong", "check"),
    [("near_only", "far_queries"), ("few_rows", "far_batch"), ("scaled", "compiled")],
    indirect=["wrong"],
)
def test_far_work_that_is_not_done_is_noticed(wrong: str, check: str) -> None:
    if wrong == "scaled":  # a fault that is the same everywhere is for the named cases to see
        stress_checks.run_job(f"{wrong} far_queries", StandIn())
        return
    with pytest.raises(AssertionError, match="the far end differs"):
        stress_checks.run_job(f"{wrong} {check}", StandIn())


def test_refusals_are_those_that_16_bit_kernels_may_make(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Wrong("refuses", lambda out, calls: out)
    backend.supports = lambda spec: "it refuses."  # type: ignore[method-assign]
    monkeypatch.setattr(dispatch, "_registered", {"refuses": backend})
    answer = named_cases.run_job("refuses bfloat16 free softcap", StandIn())
    assert "it refuses" in answer["refused"]
    assert "refused" in named_cases.run_job("refuses bfloat16 free head_dim_33", StandIn())
    with pytest.raises(ValueError, match="it refuses"):
        named_cases.run_job("refuses bfloat16 free regular", StandIn())
    backend.NAME = "triton"  # serves everything
    monkeypatch.setattr(dispatch, "_registered", {"triton": backend})
    with pytest.raises(ValueError, match="it refuses"):
        named_cases.run_job("triton bfloat16 free softcap", StandIn())


# ---- the tools that watch a process


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a stage can tell before it launches anything."""
    for stage in (sanitizer, profiling):
        monkeypatch.setattr(stage.machine, "gpu_fields", lambda: {"name": "a GPU"})
        monkeypatch.setattr(stage.package, "find_or_build", lambda context: Package(ROOT, []))


def tool_that(says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a tool on the machine that runs nothing and prints `says`."""
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    tool.chmod(0o755)
    for stage in (sanitizer, profiling):
        monkeypatch.setattr(stage, "find_tool", lambda name: str(tool))


def context(tmp_path: Path, name: str) -> Context:
    return Context(name, tmp_path, dry_run=False, seconds=60)


CLEAN = f"========= ERROR SUMMARY: 0 errors\n{watched.DONE}"


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("says", "status", "found"),
    [
        (CLEAN, "ok", "0 errors"),
        (CLEAN.replace("0 errors", "1 error"), "failed", "1 errors"),
        (
            f"{watched.DONE}\n== RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)",
            "failed",
            "3 errors",
        ),
        ("========= ERROR SUMMARY: 0 errors", "failed", "the calls did not end"),
        (watched.DONE, "failed", "the tool wrote no summary"),
    ],
)
def test_sanitizer_is_believed_only_when_the_calls_ran(
    says: str, status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool_that(says, tmp_path, monkeypatch)
    outcome = sanitizer.run(context(tmp_path, "sanitizer"))
    assert outcome.status == status
    assert found in outcome.table[0]
    assert len(outcome.data["rows"]) == len(sanitizer.RUNS)


def test_sanitizer_watches_every_family_with_the_tools_that_fit_it() -> None:
    watched_by = {one.tool: set() for one in sanitizer.RUNS}
    for one in sanitizer.RUNS:
        watched_by[one.tool].add(one.backend)
        assert set(one.targets) <= set(target.TARGETS)
        filtered = "kns=drope" in sanitizer.command("compute-sanitizer", one)
        assert filtered == (one.tool != "initcheck")  # which follows who wrote what is read
    assert set(watched_by) == {"memcheck", "racecheck", "synccheck", "initcheck"}
    assert watched_by["memcheck"] == {"cuda", "cuda_sm80"}
    assert watched_by["racecheck"] == {"cuda_sm80"}  # sm_90a pipelines give it false hazards


def test_kernels_carry_the_name_that_the_tools_look_for() -> None:
    """The sanitizer's and the profiler's filters match the namespace of every kernel."""
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").rglob("*.h")]
    kernels = [text for text in sources if "__global__ void" in text]
    assert kernels
    for text in kernels:
        assert "namespace drope" in text


NCU = (
    '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread",'
    '"sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",'
    '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",'
    '"smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio"\n'
    '"","","us","register/thread","%","inst","inst"\n'
    '"0","void drope::cuda::forward_kernel<drope::D128>(P)","1,234.5","168","71.2","0.5","3.25"'
)


@pytest.mark.usefixtures("on_a_gpu")
def test_counters_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool_that(f"==PROF== Connected\n{NCU}\n{watched.DONE}", tmp_path, monkeypatch)
    outcome = profiling.run(context(tmp_path, "profile"))
    assert outcome.status == "ok"
    row = outcome.data["rows"][0]
    assert row["launches"][0]["units"]["gpu__time_duration.sum"] == "us"
    (found,) = row["summaries"]
    assert found["duration"] == 1234.5
    assert found["registers"] == 168
    assert list(found["stalls"]) == ["gmma", "barrier"]
    assert "forward_kernel" in outcome.table[0]
    assert "tensor  71%" in outcome.table[0]


@pytest.mark.usefixtures("on_a_gpu")
def test_profiler_without_counters_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool_that("==ERROR== no permission", tmp_path, monkeypatch)
    outcome = profiling.run(context(tmp_path, "profile"))
    assert outcome.status == "failed"
    assert "no permission" in outcome.table[0]


def test_profiler_leaves_the_clock_alone() -> None:
    command = profiling.command("ncu")
    assert command[command.index("--clock-control") + 1] == "none"


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("stage", [sanitizer, profiling])
def test_machine_without_the_tool(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "find_tool", lambda name: None)
    outcome = stage.run(context(tmp_path, "profile"))
    assert outcome.status == "not measured"
    assert "not on this machine" in outcome.reason
