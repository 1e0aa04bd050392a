"""Which backend the GPU check runs where, and its calls with other libraries' arrays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import ahead, foreign_arrays, named_cases, target
from device.stress_shapes import SHAPES
from gpu_check import cases, profiling
from gpu_check.report import Context
from gpu_check.worker import Worker
from repository import ROOT
from torch import Tensor

import drope_kernels
from bench.gpu import accelerator
from bench.gpu.accelerator import Gpu, StandIn
from bench.gpu.cases import GROUPS

LISTING = {
    "cases": ["regular", "packed"],
    "decodes": ["decode"],
    "foreign": ["foreign_attention"],
    "ahead": ["ahead of bench: causal D128 B4 H16 S4096"],
}
BACKENDS = ["cuda", "cuda_sm80", "triton"]


@pytest.mark.parametrize(
    ("available", "capability", "expected"),
    [
        (["cuda", "triton", "cpu", "reference"], (9, 0), BACKENDS),
        (["cuda", "triton", "cpu", "reference"], (8, 0), ["cuda", "triton"]),
        (["triton", "cpu", "reference"], (9, 0), ["triton"]),
        (["cuda", "cpu", "reference"], (9, 0), ["cuda", "cuda_sm80"]),
    ],
)
def test_gpu_has_the_backends_of_the_build(
    available: list[str], capability: tuple[int, int], expected: list[str], on_a_gpu: Any
) -> None:
    on_a_gpu(available, capability)
    assert Gpu().backends == expected


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As far as Gpu asks what there is."""

    def settle(available: list[str], capability: tuple[int, int]) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(drope_kernels, "available_backends", lambda: available)
        monkeypatch.setattr(accelerator, "register_sm80", lambda: "cuda_sm80")

    return settle


def test_every_backend_has_its_cases() -> None:
    jobs = {}
    for stage in ("cases", "cases-triton", "ahead-triton"):
        chosen = cases.stage_backends(stage, BACKENDS)
        names = cases.job_names(LISTING, chosen, stage, dry_run=False)
        assert len(set(names)) == len(names)
        jobs[stage] = {tuple(name.split(maxsplit=3)) for name in names}
    assert {job[0] for job in jobs["cases-triton"]} == {"triton"}
    assert {job[0] for job in jobs["cases"]} == {"cuda", "cuda_sm80"}
    everything = jobs["cases"] | jobs["cases-triton"]
    assert {job[3] for job in jobs["ahead-triton"]} == set(LISTING["ahead"])
    assert {job[0] for job in jobs["ahead-triton"]} == {"triton"}
    for backend in BACKENDS:
        for name in LISTING["cases"]:
            for dtype in ("bfloat16", "float16"):
                assert (backend, dtype, "free", name) in everything
            assert (backend, "bfloat16", "deterministic", name) in everything
    assert {job[0] for job in everything if job[1] == "float32"} == {"triton"}
    assert {job[0] for job in everything if job[3] == "decode"} == {"triton", "cuda"}
    assert {job[0] for job in everything if job[3] == "foreign_attention"} == {"triton", "cuda"}
    assert not any(job[3].startswith("ahead") for job in everything)


def test_the_most_useful_cases_of_triton_come_first() -> None:
    listing = named_cases.listing(StandIn())
    names = cases.job_names(listing, ["triton"], "cases-triton", dry_run=False)
    first = [name.split(maxsplit=3)[-1] for name in names[: len(cases.USEFUL)]]
    assert tuple(first) == cases.USEFUL
    of_bfloat16 = [name for name in names if name.startswith("triton bfloat16 free ")]
    assert names[: len(of_bfloat16)] == of_bfloat16
    assert len(of_bfloat16) == len(listing["cases"]) + len(listing["decodes"])


def test_stage_without_its_backend_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = LISTING | {"backends": ["cuda"]}
    monkeypatch.setattr(Worker, "ask", lambda *_: dict(listing))
    outcome = cases.run(Context("cases-triton", tmp_path, dry_run=True, seconds=60))
    assert outcome.status == "failed"
    assert "there are ['cuda']" in outcome.reason


def test_stage_whose_worker_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "ask", lambda *_: {"error": "RuntimeError: no NVIDIA driver"})
    outcome = cases.run(Context("cases", tmp_path, dry_run=True, seconds=60))
    assert outcome.status == "failed"
    assert outcome.table == ["FAILED list: RuntimeError: no NVIDIA driver"]


def test_what_did_not_pass_is_told() -> None:
    job = "triton float16 free"
    rows: list[dict[str, Any]] = [{"job": f"{job} {name}"} for name in ("regular", "packed")]
    rows += [{"job": f"{job} foreign_decode", "not_run": "cupy is not on this machine"}]
    rows += [{"job": "cuda float16 free softcap", "refused": " it has no softcap.\n"}]
    rows += [{"job": f"{job} window", "error": "MismatchError: out"}]
    ours, cuda, *reasons = cases.table(rows)
    assert " ".join(ours.split()) == "triton float16 free 2 passed, 1 not run, 1 failed"
    assert cuda.split()[3:] == ["1", "refused"]
    assert reasons == [
        "triton foreign_decode not run: cupy is not on this machine",
        "cuda softcap refused: it has no softcap.",
    ]


def test_all_that_is_timed_or_repeated_is_compiled_ahead() -> None:
    features = {ahead.features(case) for case in ahead.bench_cases()}
    for group in GROUPS.values():
        assert {ahead.features(case) for case in group} <= features
    assert len(ahead.CALLS) == len(features) + len(SHAPES)
    assert len(features) < sum(map(len, GROUPS.values())) / 2


def test_profiler_sees_both_languages() -> None:
    assert {name for _, name in profiling.RUNS} <= set(target.TARGETS)
    assert {backend for backend, _ in profiling.RUNS} == {"cuda", "triton"}
    ours = re.compile(profiling.OUR_KERNELS.removeprefix("regex:"))
    assert ours.search("void drope::cuda::forward_kernel<drope::D128>(P)")
    assert not ours.search("void at::native::vectorized_elementwise_kernel<4, at::F>(int, F)")
    triton = ROOT / "drope_kernels" / "backends" / "triton"
    launched = [
        name
        for path in triton.glob("launch_*.py")
        for name in re.findall(r"(\w+)\[\(.*\)\]\(", path.read_text())
    ]
    assert {"forward_kernel", "prepare_kernel"} <= set(launched)
    assert all(ours.search(name) for name in launched)


# ---- arrays of other libraries


def returned_as_tensors(original: Any) -> Any:
    return lambda **call: original(**{name: as_tensor(x) for name, x in call.items()})


def computed_late(original: Any) -> Any:
    """What comes back shares the memory of q, which the caller overwrites."""

    def call(**arguments: Any) -> Any:
        out, lse = original(**arguments)
        arguments["q"][...] = out
        return arguments["q"], lse

    return call


def written_elsewhere(original: Any) -> Any:
    def call(**arguments: Any) -> Any:
        caches = {name: arguments[name].copy() for name in ("k_cache", "v_cache")}
        return original(**arguments | caches)

    return call


def as_tensor(x: Any) -> Any:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def with_tensors(fault: Any, original: Any) -> Any:
    """Only calls with arrays have the fault."""
    faulty = fault(original)
    return lambda **call: (original if isinstance(call["q"], Tensor) else faulty)(**call)


@pytest.mark.parametrize(
    ("name", "function", "fault", "message"),
    [
        ("foreign_attention", "attention", returned_as_tensors, "got {"),
        ("foreign_attention", "attention", computed_late, "differ from the call with tensors"),
        ("foreign_decode", "attention_decode", written_elsewhere, "k_cache: "),
    ],
)
def test_faults_with_foreign_arrays_are_noticed(
    name: str, function: str, fault: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = f"reference float16 free {name}"
    assert named_cases.run_job(job, StandIn()) == {}
    original = getattr(foreign_arrays.dk, function)
    monkeypatch.setattr(foreign_arrays.dk, function, with_tensors(fault, original))
    with pytest.raises(AssertionError, match=re.escape(message)):
        named_cases.run_job(job, StandIn())
