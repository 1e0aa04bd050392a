"""A visit of a GPU without a GPU: its stages in their order, its seconds, its one tar."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_check.report import python_path
from gpu_check.runner import Stage
from gpu_check.visit import conduct
from gpu_check.visit.carried import Unpacked
from gpu_check.visit.plan import PROBES, Step, Task, Visit
from repository import ROOT

from bench import machine
from bench.gpu import archive

# ---- stages in their order, within the seconds

STUB = """
import os, time
from pathlib import Path
from gpu_check.report import OK, RUNNING, Outcome

def run(context):
    folder = Path({folder!r})
    only = None if context.only is None else sorted(context.only)
    context.save(Outcome(RUNNING, {{"first": 1, "process": os.getpid(), "only": only}}, []))
    (folder / (context.name + ".began")).write_text(str(time.time()))
    time.sleep({seconds})
    (folder / (context.name + ".ended")).write_text(str(time.time()))
    data = {{"seconds": context.seconds, "only": only}}
    return Outcome({status!r}, data, ["said " + context.name])
"""


class Stubs:
    """Stages that take a while and note when they began and ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: dict[str, Stage] = {}
        self.tasks: list[Task] = []

    def add(self, name: str, seconds: float = 0, status: str = "ok", **step: Any) -> None:
        """With `cap` and `least` among the keywords it is a task of the visit as well."""
        module = f"stub_{name.replace('-', '_')}"
        text = STUB.format(folder=str(self.folder), seconds=seconds, status=status)
        (self.folder / f"{module}.py").write_text(text)
        self.stages[name] = Stage(module, 60)
        if "cap" in step:
            only = step.pop("only", None)
            chosen = Step(name, "an answer", "a guess", step.pop("estimate", 1), **step)
            self.tasks.append(Task(chosen, only, chosen.estimate))

    def at(self, event: str) -> float:
        return float((self.folder / event).read_text())

    def visit(self, budget: float) -> Visit:
        return Visit(1, budget, tuple(self.tasks))


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    """On a machine that has a GPU as far as the visit can tell, with the package in place."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{python_path(ROOT)}")
    gpu = {"name": "NVIDIA H200", "compute_cap": "9.0"}
    monkeypatch.setattr(machine, "gpu_fields", lambda: gpu)
    monkeypatch.setattr(conduct, "unpack", lambda carried: Unpacked("", ""))
    return Stubs(folder)


def run(stubs: Stubs, out: Path, budget: float = 60) -> tuple[int, dict[str, dict[str, Any]]]:
    status = conduct.run(stubs.visit(budget), stubs.stages, out, None, dry_run=False)
    return status, archive.read_reports(out / "visit-1.tar.gz")


def test_a_visit_brings_one_tar_with_every_report(stubs: Stubs, tmp_path: Path) -> None:
    stubs.add("layout", cap=30, least=1)
    stubs.add("cases", cap=30, least=1, only=frozenset(["b", "a"]))
    status, reports = run(stubs, tmp_path / "out")
    assert status == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["visit-1.tar.gz"]
    assert set(reports) == {"visit", "layout", "cases"}
    assert reports["layout"]["data"] == {"seconds": 30, "only": None}
    assert reports["cases"]["data"]["only"] == ["a", "b"]
    assert [one["stage"] for one in reports["visit"]["data"]["stages"]] == ["layout", "cases"]
    assert reports["visit"]["status"] == "ok"
    said = "\n".join(reports["visit"]["data"]["said"])
    assert "NVIDIA H200" in said
    assert "everything applies" in said


def test_a_stage_gets_what_is_left_and_not_less_than_its_least(
    stubs: Stubs, tmp_path: Path
) -> None:
    stubs.add("layout", seconds=600, cap=3, least=1)  # hangs
    stubs.add("env", status="failed", cap=30, least=1)
    stubs.add("cases", cap=30, least=29)
    stubs.add("bench-cuda", cap=30, least=29, spare=True)
    started = time.monotonic()
    status, reports = run(stubs, tmp_path / "out", budget=30)
    assert time.monotonic() - started < 30
    assert status == 1
    assert reports["layout"]["reason"].startswith("stopped: over its budget of 3 s")
    assert reports["layout"]["data"]["first"] == 1, "what it had is kept"
    assert reports["env"]["data"]["seconds"] < 30
    endings = {one["stage"]: one["ending"] for one in reports["visit"]["data"]["stages"]}
    assert "not started" in endings["cases"]
    assert "needs 29" in endings["cases"]
    with pytest.raises(ProcessLookupError):
        os.kill(reports["layout"]["data"]["process"], 0)


def test_spare_stages_without_time_are_no_failure(stubs: Stubs, tmp_path: Path) -> None:
    stubs.add("env", cap=30, least=1)
    stubs.add("launch", cap=90, least=80, spare=True)
    status, _ = run(stubs, tmp_path / "out", budget=30)
    assert status == 0


def test_the_build_runs_beside_what_needs_no_package(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "unpack", lambda carried: Unpacked("it is stale", ""))
    stubs.add("build", seconds=3)
    stubs.add("layout", cap=30, least=1)
    stubs.add("cases", cap=30, least=1)
    status, reports = run(stubs, tmp_path / "out")
    assert status == 0
    assert stubs.at("layout.ended") < stubs.at("build.ended") <= stubs.at("cases.began")
    assert set(reports) == {"visit", "build", "layout", "cases"}
    assert "it is stale" in "\n".join(reports["visit"]["data"]["said"])


def test_probes_that_are_not_carried_have_time_to_be_compiled(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "unpack", lambda carried: Unpacked("", "it is stale"))
    stubs.add("layout", cap=5, least=1)
    stubs.add("env", cap=5, least=1)
    _, reports = run(stubs, tmp_path / "out", budget=90)
    assert reports["layout"]["data"]["seconds"] == 5 + PROBES.estimate
    assert reports["env"]["data"]["seconds"] == 5


@pytest.mark.parametrize(("seconds", "status"), [(0, "failed"), (600, "ok")])
def test_without_a_package_what_needs_it_does_not_start(
    seconds: float,
    status: str,
    stubs: Stubs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The build fails; or it hangs, and what needs no package still has its turn."""
    monkeypatch.setattr(conduct, "unpack", lambda carried: Unpacked("it is stale", ""))
    stubs.add("build", seconds=seconds, status=status)
    stubs.add("cases", cap=30, least=5)
    stubs.add("env", cap=30, least=1)
    code, reports = run(stubs, tmp_path / "out", budget=15)
    assert code == 1
    endings = {one["stage"]: one["ending"] for one in reports["visit"]["data"]["stages"]}
    assert endings["cases"] == "not started: the package is not there"
    assert endings["env"].startswith("ok")
    assert not (stubs.folder / "cases.began").exists()


def test_without_a_gpu_nothing_is_run(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpu_fields", dict)
    stubs.add("layout", cap=30, least=1)
    status, reports = run(stubs, tmp_path / "out")
    assert status == 1
    assert "nvidia-smi finds no GPU" in "\n".join(reports["visit"]["data"]["said"])
    assert set(reports) == {"visit"}


KILLED = """
import sys
from pathlib import Path
from bench import machine
from gpu_check.runner import Stage
from gpu_check.visit import conduct
from gpu_check.visit.carried import Unpacked
from gpu_check.visit.plan import PROBES, Step, Task, Visit

machine.gpu_fields = lambda: {"name": "a GPU", "compute_cap": "9.0"}
conduct.unpack = lambda carried: Unpacked("", "")
stages = {name: Stage("stub_" + name, 60) for name in ("env", "layout")}
tasks = tuple(Task(Step(name, "", "", 1, 60, 1), None, 1) for name in stages)
sys.exit(conduct.run(Visit(1, 90, tasks), stages, Path(sys.argv[1]), None, dry_run=False))
"""


def wait_until(what: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not what():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.05)


def test_a_visit_that_is_ended_leaves_its_tar_and_no_process(stubs: Stubs, tmp_path: Path) -> None:
    stubs.add("env")
    stubs.add("layout", seconds=600)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    try:
        wait_until((stubs.folder / "layout.began").exists)
        assert set(archive.read_reports(tmp_path / "visit-1.tar.gz")) >= {"visit", "env"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    reports = archive.read_reports(tmp_path / "visit-1.tar.gz")
    assert reports["env"]["status"] == "ok"
    assert reports["layout"]["data"]["first"] == 1
    assert reports["visit"]["status"] == "failed"
    assert reports["visit"]["table"][-1] == "-- visit: ended from outside"
    with pytest.raises(ProcessLookupError):
        os.kill(reports["layout"]["data"]["process"], 0)


# ---- another GPU


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        ("9.0", "everything applies"),
        ("8.0", "`cuda_sm80` do not apply"),
        ("8.9", "`cuda` is they"),
        ("10.0", "from their PTX"),
        ("12.0", "from their PTX"),
        ("7.5", "nothing applies"),
        (None, "no GPU is found"),
    ],
)
def test_another_gpu_is_told_what_applies(capability: str | None, said: str) -> None:
    assert said in machine.what_applies(capability)


# ---- the tar


def write(folder: Path, **reports: dict[str, Any]) -> Path:
    folder.mkdir()
    for name, one in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(one))
    return folder


def test_a_tar_over_its_limit_leaves_out_what_is_worth_least(tmp_path: Path) -> None:
    folder = tmp_path / "visit-1"
    noise = {name: os.urandom(40_000).hex() for name in ("cases", "layout", "train")}
    write(folder, **{name: {"noise": text} for name, text in noise.items()}, visit={"said": []})
    packed = archive.Archive(tmp_path / "v.tar.gz", folder, ["layout", "cases", "train"], 100_000)
    packed.renew()
    assert packed.path.stat().st_size <= 100_000
    assert packed.left_out == ["train"]
    assert list(archive.read_reports(packed.path)) == ["cases", "layout", "visit"]
    smallest = replace_limit(packed, 1000)
    assert smallest.left_out == ["layout", "cases", "train"]
    assert list(archive.read_reports(packed.path)) == ["visit"]
    with tarfile.open(packed.path) as tar:
        assert tar.getnames() == ["visit-1/visit.json"]


def replace_limit(packed: archive.Archive, limit: int) -> archive.Archive:
    packed.limit = limit
    packed.renew()
    return packed


def test_what_the_tar_left_out_is_said(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct.limits, "RESULT_BYTES", 100)
    stubs.add("layout", cap=30, least=1)
    _, reports = run(stubs, tmp_path / "out")
    assert set(reports) == {"visit"}
    assert reports["visit"]["data"]["left_out"] == ["layout"]
    assert "left out of the tar" in reports["visit"]["table"][-1]


def test_results_are_read_from_a_folder_as_from_a_tar(tmp_path: Path) -> None:
    folder = write(tmp_path / "visit-2", env={"status": "ok"})
    packed = archive.Archive(tmp_path / "v.tar.gz", folder, [], 1 << 20)
    packed.renew()
    assert archive.read_reports(folder) == archive.read_reports(packed.path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no JSON"):
        archive.read_reports(tmp_path / "empty")
