"""Jobs of the GPU check in a process of their own: crashes, hangs and refusals cost one job."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_check import installed, jobs, package
from gpu_check.report import Context, python_path
from gpu_check.worker import Worker, answer
from repository import ROOT

from bench import machine
from bench.gpu import timing
from bench.gpu.accelerator import Gpu, StandIn

STUB = """
import os, time
from bench.gpu.accelerator import StandIn

def run_job(job, where):
    if job == "package":
        import drope_kernels
        return {"file": drope_kernels.__file__}
    if job == "crash":
        os._exit(7)
    if job == "hang":
        time.sleep(600)
    if job == "wrong":
        assert False, "it is wrong"
    if job == "noise":
        print("a library prints", flush=True)
    if job == "lose":
        def settle():
            raise RuntimeError("an illegal memory access was encountered")
        where.settle = settle
    return {"process": os.getpid()}
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    (tmp_path / "stub_jobs.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{python_path(ROOT)}")
    worker = Worker("stub_jobs", "dry-run")
    yield worker
    worker.close()


def test_worker_outlives_what_its_jobs_do(worker: Worker) -> None:
    first = worker.ask("fine", 60)["process"]
    assert "it is wrong" in worker.ask("wrong", 60)["error"]
    assert worker.ask("noise", 60)["process"] == first, "a wrong result costs no new process"
    assert "status 7" in worker.ask("crash", 60)["error"]
    second = worker.ask("fine", 60)["process"]
    assert second != first
    lost = worker.ask("lose", 60)
    assert "illegal memory access" in lost["error"]
    third = worker.ask("fine", 60)["process"]
    assert third not in (first, second), "a lost device needs a new process"


def test_hanging_job_is_stopped(worker: Worker) -> None:
    process = worker.ask("fine", 60)["process"]
    started = time.monotonic()
    assert "no answer within 1 s" in worker.ask("hang", 1)["error"]
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_jobs_import_the_installed_package(
    tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the tree's own, which has no kernels where stage build installed elsewhere."""
    package_folder = tmp_path / "site" / "drope_kernels"
    package_folder.mkdir(parents=True)
    (package_folder / "__init__.py").touch()
    monkeypatch.chdir(ROOT)
    other = Worker("stub_jobs", "dry-run", tmp_path / "site")
    try:
        assert other.ask("package", 60)["file"] == str(package_folder / "__init__.py")
    finally:
        other.close()


def test_worker_that_cannot_start_is_not_started_forever(tmp_path: Path) -> None:
    broken = Worker("no_such_module", "dry-run")
    for _ in range(2):
        assert "no_such_module" in broken.ask("fine", 60)["error"]
    started = time.monotonic()
    assert "no_such_module" in broken.ask("fine", 60)["error"]
    assert time.monotonic() - started < 0.2


def job_run(tmp_path: Path, seconds: float = 60, *, dry_run: bool = True) -> jobs.JobRun:
    return jobs.JobRun(Context("cases", tmp_path, dry_run, seconds), "named_cases", 30)


JOB = "reference bfloat16 free regular"


def test_jobs_without_time_are_named(tmp_path: Path) -> None:
    with job_run(tmp_path, seconds=0) as run:
        run.ask_all([JOB])
    outcome = run.outcome([])
    assert outcome.status == "failed"
    assert outcome.data["planned"] == outcome.data["unreached"] == [JOB]
    assert outcome.table == ["1 not reached in time"]


def test_only_the_jobs_that_were_asked_for_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "ask", lambda *_: {})
    context = Context("cases", tmp_path, dry_run=True, seconds=60, only=frozenset(["b", "d"]))
    with jobs.JobRun(context, "named_cases", 30) as run:
        run.ask_all(["a", "b", "c", "d"])
    assert run.data["planned"] == [row["job"] for row in run.rows] == ["b", "d"]


def test_jobs_of_a_kind_that_hangs_are_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs its whole time, which the other kinds need."""

    def ask(self: Worker, name: str, seconds: float) -> dict[str, Any]:
        return {"error": "no answer", "hung": True} if name.startswith("cuda ") else {}

    monkeypatch.setattr(Worker, "ask", ask)
    with job_run(tmp_path) as run:
        run.ask_all(["cuda a", "cuda b", "cuda c", "cuda_sm80 a", "cuda d"])
    assert [row["job"] for row in run.rows] == ["cuda a", "cuda b", "cuda_sm80 a"]
    assert run.outcome([]).data["unreached"] == ["cuda c", "cuda d"]


def test_jobs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_fields", dict)
    with job_run(tmp_path, dry_run=False) as run:
        assert run.blocked == "nvidia-smi finds no GPU"
    assert run.outcome([]).status == "failed"


def test_workers_share_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time, each job once; what one raises is not lost."""
    together = threading.Barrier(2, timeout=30)
    asked: list[tuple[Worker, str]] = []

    def ask(self: Worker, name: str, seconds: float) -> dict[str, Any]:
        together.wait()
        asked.append((self, name))
        return {"error": "wrong"} if name == "a 3" else {}

    monkeypatch.setattr(Worker, "ask", ask)
    names = [f"a {index}" for index in range(6)]
    context = Context("cases-triton", tmp_path, dry_run=True, seconds=60)
    with jobs.JobRun(context, "named_cases", 30, num_workers=2) as run:
        run.ask_all(names)
    assert sorted(name for _, name in asked) == names
    assert {id(one) for one, _ in asked} == {id(one) for one in run.workers}
    assert [row["job"] for row in run.failures] == ["a 3"]
    assert json.loads(context.path.read_text())["data"]["rows"] == run.rows

    monkeypatch.setattr(Worker, "ask", lambda *_: {}["no such key"])
    with pytest.raises(KeyError):
        run.ask_all(names)


def test_compiled_kernels_outlive_workers_and_builds() -> None:
    """A later call on the machine finds them; nothing of them is sent back or committed."""
    worker = Worker("named_cases", "measure", num_beside=4)
    assert worker.environment["TRITON_CACHE_DIR"] == str(installed.TRITON_CACHE)
    assert installed.TRITON_CACHE.parent == ROOT / "build"
    assert not installed.TRITON_CACHE.is_relative_to(installed.FOLDER)
    cores = os.cpu_count() or 1
    assert int(worker.environment["OMP_NUM_THREADS"]) == max(1, cores // 4)


def test_triton_error_costs_one_job() -> None:
    """Its compiler's errors are no RuntimeErrors."""
    errors = pytest.importorskip("triton.errors", reason="triton is not installed")

    def refuse(job: str, where: Any) -> dict[str, Any]:
        raise errors.TritonError("out of resource: shared memory")

    found = answer(SimpleNamespace(run_job=refuse), "job", StandIn())
    assert "out of resource: shared memory" in found["error"]
    assert "lost" not in found


def test_gpu_is_not_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        Gpu()


# ---- the installed package


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    monkeypatch.setattr(installed, "FOLDER", site)
    monkeypatch.setattr(installed, "STAMP", site / "sources.txt")
    return site


def test_package_is_built_once_for_the_same_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def build(way: str, command: list[str], seconds: float) -> dict[str, Any]:
        commands.append(command)
        folder.mkdir()
        return {"returncode": 0}

    monkeypatch.setattr(package.build, "run_logged", build)
    context = Context("cases", tmp_path, dry_run=False, seconds=60)
    for _ in range(2):
        assert package.find_or_build(context).folder == folder
    assert len(commands) == 1
    assert str(folder) in commands[0]
    installed.STAMP.write_text("other sources")
    package.find_or_build(context)
    assert len(commands) == 2


def test_package_that_does_not_build_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package.build, "run_logged", lambda *_: {"returncode": 1})
    found = package.find_or_build(Context("cases", tmp_path, dry_run=False, seconds=60))
    assert "does not build" in found.error
    assert not installed.is_current()


# ---- timing


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("ours", "theirs")}
    clock = iter(float(x) for x in range(1, 1000))

    def sample(call: Any) -> float:
        call()
        return next(clock)

    times = timing.interleave(calls, sample, target_ms=3.0)
    assert order == ["ours", "theirs"] * (2 + timing.MIN_CALLS)
    assert times["ours"].num_calls == timing.MIN_CALLS
    assert times["ours"].median_ms == 7.0  # of 3, 5, 7, 9, 11
    assert (times["ours"].p25_ms, times["ours"].p75_ms) == (5.0, 9.0)
