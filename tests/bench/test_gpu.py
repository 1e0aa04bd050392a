"""The GPU benchmark without a GPU: its cases, its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gpu_check import bench as bench_stage

from bench import gpu_report, gpu_results
from bench.gpu import archive
from bench.gpu import jobs as bench_jobs
from bench.gpu.accelerator import StandIn
from bench.gpu.cases import GROUPS, PARTS, GpuCase, cases_of, find

ALL = gpu_results.all_cases()


# ---- cases


def test_groups_cover_what_is_promised() -> None:
    for group, cases in GROUPS.items():
        assert len({case.label for case in cases}) == len(cases)
        for case in cases:
            assert find(group, case.label) == case
    causal = {
        (case.shape.head_dim, case.shape.seqlen_q)
        for case in ALL
        if case.shape.causal and not case.rope
    }
    for head_dim in (64, 128):
        lengths = [2**power for power in (*range(9, 16), 17, 20)]
        assert {(head_dim, length) for length in lengths} <= causal
    trained = [case.shape for case in ALL if case.shape.backward]
    assert max(shape.seqlen_q for shape in trained) == 2**17
    decodes = [case for case in ALL if case.shape.is_decode]
    assert all(case.shape.kv_bytes >= 256 << 20 for case in decodes)
    for wanted in (lambda c: c.page_size, lambda c: c.rope, lambda c: c.shape.num_heads_kv == 32):
        assert any(wanted(case) for case in decodes)
    for case in ALL:
        assert case.shape.tensor_bytes < 40 << 30
    assert {case.shape.head_dim for case in ALL} == {64, 96, 128, 256}


# ---- the tables


def times(milliseconds: float) -> dict[str, float]:
    low, high = 0.98 * milliseconds, 1.02 * milliseconds
    return {"median_ms": milliseconds, "p25_ms": low, "p75_ms": high, "num_calls": 20}


def measured(case: GpuCase, contender: str, milliseconds: float) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.label, "contender": contender, "errors": {"out": 1e-3}}
    kinds = ("forward", "backward", "train") if case.shape.backward else ("forward",)
    for kind in kinds:
        row[kind] = times(milliseconds)
        row |= bench_jobs.rates(case, kind, milliseconds)
    row["peak_bytes"] = dict.fromkeys(kinds, 64 << 20)
    return row


HOST_US = (("triton", 61.4), ("cuda", 20.6), ("sdpa", 11.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """OUT of a GPU run in which one prefill, one decode and one rotary case were reached."""
    prefill, decode, rope = GROUPS["quick"][0], GROUPS["quick"][6], GROUPS["quick"][8]
    rows = [measured(prefill, name, ms) for name, ms in (("cuda", 1.0), ("sdpa_flash", 1.5))]
    rows += [measured(decode, "cuda", 0.2), measured(rope, "cuda", 1.05)]
    rows += [measured(rope, "cuda_no_rope", 1.0), measured(rope, "sdpa_cudnn", 1.26)]
    rows += [measured(prefill, "cuda_sm80", 2.0), measured(prefill, "triton", 1.25)]
    rows += [measured(decode, "triton", 0.25), measured(decode, "sdpa_flash", 0.5)]
    rows += [{"case": prefill.label, "contender": "flash_attn_3", "error": "ImportError: none"}]
    ceilings = {"copy": {"terabytes_per_second": 3.0}, "matmul": {"tflops": 800.0}}
    clocks = {"clocks.sm": "1755 MHz", "power.draw": "400 W"}
    report = {
        "stage": "bench-quick",
        "dry_run": False,
        "machine": {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580"},
        "versions": {"torch": "2.11.0", "flash-attn": None},
        "commit": "0123456789abcdef",
        "sources": "0" * 12,
        "started": "2026-12-01T00:00:00Z",
        "data": {
            "ceilings": ceilings,
            "gpu_before": clocks,
            "gpu_after": clocks,
            "rows": [{"shape": {}, "rows": rows}],
        },
    }
    (tmp_path / "bench-quick.json").write_text(json.dumps(report))
    launches = [{"job": f"steady {name}", "host_us": {"decode": us}} for name, us in HOST_US]
    seconds = {"cold": {"forward": 3.21}, "warm": {"forward": 0.12}}
    launches += [{"job": "first triton", "first_seconds": seconds}, {"job": "x", "error": "none"}]
    launch = report | {"stage": "launch", "data": {"rows": launches}}
    (tmp_path / "launch.json").write_text(json.dumps(launch))
    env = report | {"stage": "env", "data": {"ceilings": ceilings}}  # no benchmark
    (tmp_path / "env.json").write_text(json.dumps(env))
    return tmp_path


def line(text: str, label: str) -> str:
    return next(one for one in text.splitlines() if one.startswith(f"| {label} |"))


def below(text: str, heading: str) -> str:
    """What follows the line `heading`."""
    return text.split(f"\n{heading}\n")[1]


def test_results_go_from_the_check_to_the_tables(folder: Path, tmp_path: Path) -> None:
    path = gpu_results.save(gpu_results.collect(folder), tmp_path / "results")
    assert path.name == "nvidia-h100-80gb-hbm3-2026-12-01-0123456789ab.json"
    results = gpu_results.newest(tmp_path / "results")
    assert results.machine["clocks"]["bench-quick"]["after"]["power.draw"] == "400 W"
    assert results.machine["versions"] == {"torch": "2.11.0"}
    text = gpu_report.section(results)
    assert "NVIDIA H100 80GB HBM3, driver 580, torch 2.11.0" in text
    case = GROUPS["quick"][0]
    rate = case.shape.forward_flops / 1e9
    cells = line(text, case.label).split(" | ")
    assert cells[1:3] == [f"{rate:.0f}", "4.0%"]
    assert cells[5:7] == [f"{rate / 800:.0%}", "64"]
    assert "1.50x / 1.50x" in cells  # over sdpa_flash
    assert "| 0.75x |" in text  # the sm_80 kernels over sdpa_flash
    assert "| 5.0% |" not in text
    assert "| +5.0% |" in line(text, GROUPS["quick"][8].label)
    assert "1.20x sdpa_cudnn" in line(text, GROUPS["quick"][8].label)
    assert "| not measured |" in line(text, GROUPS["lengths"][0].label)
    readme = gpu_report.readme_table(results)
    assert "1.50x / 1.50x" in readme
    assert readme.count("not measured") == 2


def test_triton_has_its_tables(folder: Path, tmp_path: Path) -> None:
    gpu_results.save(gpu_results.collect(folder), tmp_path / "results")
    results = gpu_results.newest(tmp_path / "results")
    text = below(gpu_report.section(results), "The Triton kernels, TFLOP/s, of a decode TB/s:")
    prefill, decode = GROUPS["quick"][0], GROUPS["quick"][6]
    rates = [prefill.shape.forward_flops / 1.25e9, prefill.shape.backward_flops / 1.25e9]
    cells = line(text, prefill.label).strip(" |").split(" | ")
    assert cells[1:4] == [f"{rates[0]:.0f}", "4.0%", f"{rates[1]:.0f}"]
    assert cells[5:] == ["1.20x / 1.20x", "0.80x / 0.80x"]  # over sdpa_flash, over cuda
    assert line(text, decode.label).strip(" |").split(" | ")[5:] == ["2.00x", "0.80x"]
    assert "| not measured |" in line(text, GROUPS["decode"][0].label)
    assert line(text, "decode").split(" | ")[1:4] == ["21", "61", "11"]
    assert "| 3.21 | 0.12 |" in line(text, "forward")


def test_the_tars_of_two_visits_are_one_result(folder: Path, tmp_path: Path) -> None:
    """The peers' rows are those that were timed beside the CUDA kernels, clocks beside them."""
    first = json.loads((folder / "bench-quick.json").read_text()) | {"stage": "bench-cuda"}
    first["data"]["rows"][0]["clocks"] = {"clocks.sm": "1980 MHz"}
    case = GROUPS["quick"][0]
    rows = [measured(case, "triton", 3.0), measured(case, "sdpa_flash", 9.0)]
    second = first | {"stage": "bench-triton"}
    second["data"] = first["data"] | {"rows": [{"shape": {}, "rows": rows}]}
    tars = []
    for report in (first, second):
        inside = tmp_path / f"visit-{len(tars) + 1}"
        inside.mkdir()
        (inside / f"{report['stage']}.json").write_text(json.dumps(report))
        tars.append(tmp_path / f"{inside.name}.tar.gz")
        archive.Archive(tars[-1], inside, [], 1 << 20).renew()
    results = gpu_results.collect(*tars)
    flash, cuda = (results.row(case, name) for name in ("sdpa_flash", "cuda"))
    assert flash["forward"]["median_ms"] == 1.5
    assert cuda["clocks"] == {"clocks.sm": "1980 MHz"}
    assert set(results.machine["clocks"]) == {"bench-cuda", "bench-triton"}
    assert results.row(case, "triton")["forward"]["median_ms"] == 1.25, "beside the CUDA kernels"
    results = gpu_results.collect(tars[1])
    assert results.row(case, "triton")["forward"]["median_ms"] == 3.0


def test_a_part_of_a_group_has_its_contenders_alone() -> None:
    case = GROUPS["quick"][0]
    where = StandIn()
    where.backends = ("cuda", "cuda_sm80", "triton")
    names = {
        part: [one.name for one in bench_jobs.chosen_contenders(case, where, False, PARTS[part])]
        for part in PARTS
    }
    assert names["cuda"][:4] == ["cuda", "cuda_sm80", "sdpa_cudnn", "sdpa_flash"]
    assert "triton" not in names["cuda"]
    assert names["triton"] == ["triton", "sdpa_flash"]
    shapes = {(one.shape.head_dim, one.shape.seqlen_q) for one in cases_of("cuda")}
    assert {(dim, length) for dim in (64, 128) for length in (1024, 4096, 16_384)} <= shapes
    assert sum(one.shape.is_decode for one in cases_of("cuda")) == 2


def test_different_sources_do_not_make_one_result(folder: Path) -> None:
    other = json.loads((folder / "bench-quick.json").read_text())
    (folder / "bench-long.json").write_text(json.dumps(other | {"sources": "f" * 12}))
    with pytest.raises(ValueError, match="one state of the sources"):
        gpu_results.collect(folder)


def test_a_dry_run_has_no_results(folder: Path) -> None:
    report = json.loads((folder / "bench-quick.json").read_text())
    (folder / "bench-quick.json").write_text(json.dumps(report | {"dry_run": True}))
    with pytest.raises(ValueError, match="found none with numbers"):
        gpu_results.collect(folder)


def test_every_case_says_that_it_was_not_measured() -> None:
    text = gpu_report.section(gpu_results.NOTHING)
    for case in ALL:
        assert "| not measured |" in line(text, case.label)
    assert re.search(r"\d(x|%|\.\d+) \|", text) is None, "a number, of what?"


def test_documentation_shows_the_newest_results() -> None:
    results = gpu_results.newest()
    shown = gpu_report.between_marks(gpu_report.DOCS)
    assert shown == gpu_report.section(results)
    assert gpu_report.between_marks(gpu_report.README) in (None, gpu_report.readme_table(results))


def test_tables_replace_what_stood_between_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"above\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nbelow\n")
    for _ in range(2):
        gpu_report.write_between_marks(path, "new")
    assert gpu_report.between_marks(path) == "new"
    assert path.read_text().startswith("above\n")
    assert path.read_text().endswith("\nbelow\n")


# ---- the stage's own table


def test_stage_compares_with_the_best_peer() -> None:
    case = GROUPS["quick"][0]
    rows = [
        measured(case, "cuda", 1.0),
        measured(case, "sdpa_flash", 2.0),
        measured(case, "sdpa_cudnn", 0.8),
    ]
    (shown,) = bench_stage.table(rows)
    assert "(0.80x sdpa_cudnn)" in shown
    assert "sdpa_flash" not in shown


def test_row_with_a_wrong_result_is_no_line_of_the_table() -> None:
    row = {"case": "x", "contender": "cuda", "error": "ValueError: wrong result, not timed"}
    assert bench_stage.table([row]) == []
    assert bench_stage.is_ours(row)
