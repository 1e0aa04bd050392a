"""The plans of a visit: the table, its clock, and what a second visit asks after a first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gpu_check import command, runner
from gpu_check.visit import clock, earlier, plan
from gpu_check.visit.carried import Unpacked
from gpu_check.visit.plan import VISITS, prepare
from repository import ROOT

ALL_THERE = Unpacked("", "")
LIMITS = {1: 330, 2: 240}  # seconds; together with two starts they fit a quarter of an hour


# ---- the table


@pytest.mark.parametrize("number", VISITS)
def test_plans_fit_their_budgets(number: int) -> None:
    visit = prepare(number, None)
    assert visit.budget == LIMITS[number]
    assert visit.total(ALL_THERE) <= visit.budget
    assert clock.unreached(visit, ALL_THERE) == []
    text = "\n".join(clock.lines(visit, ALL_THERE))
    assert "estimates" in text
    assert all(task.step.stage in text for task in visit.tasks)


@pytest.mark.parametrize("number", VISITS)
def test_every_step_is_a_stage_with_room_for_its_estimate(number: int) -> None:
    for step in VISITS[number].steps:
        assert step.least <= step.estimate <= step.cap <= runner.STAGES[step.stage].seconds
        assert step.answers
        assert step.basis


def test_the_first_visit_asks_what_decides_most_first() -> None:
    order = [task.step.stage for task in prepare(1, None).tasks]
    assert order[:2] == ["layout", "env"]
    assert order[2:5] == ["cases", "bench-cuda", "cases-triton"]
    planned = {task.step.stage for n in VISITS for task in prepare(n, None).tasks}
    assert {"bench-triton", "train", "stress"} <= planned


def test_the_documentation_has_the_table() -> None:
    text = (ROOT / "docs" / "gpu-check.md").read_text()
    for number in VISITS:
        for task in prepare(number, None).tasks:
            step = task.step
            seconds = "in spare seconds" if step.spare else f"{step.estimate}"
            row = rf"\| {number} \| `{step.stage}` \| {seconds} \| {step.cap} \|"
            assert re.search(row, text), row


# ---- the clock


def test_a_plan_over_its_budget_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "check", lambda folder: ALL_THERE)
    assert command.main(["--dry-run", "--visit", "1"]) == 0
    assert "OVER THE BUDGET" not in capsys.readouterr().out
    assert command.main(["--dry-run", "--visit", "1", "--seconds", "120"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"OVER THE BUDGET by \d+ s: not reached would be .*cases-triton", said)


def test_what_is_not_carried_is_made_there(capsys: pytest.CaptureFixture[str]) -> None:
    """The package beside the first stages, the probes before theirs."""
    visit = prepare(1, None)
    beside = sum(task.estimate for task in visit.tasks[:2])
    rows = {row.what: row.estimate for row in visit.clock(Unpacked("stale", ""))}
    assert rows["wait for build"] == plan.BUILD.estimate - beside > 0
    assert list(rows).index("wait for build") == list(rows).index("cases") - 1
    assert visit.total(Unpacked("stale", "")) == visit.total(ALL_THERE) + rows["wait for build"]
    rows = {row.what: row.estimate for row in visit.clock(Unpacked("stale", "stale"))}
    assert list(rows).index("probes") == list(rows).index("layout") - 1
    assert rows["wait for build"] < plan.BUILD.estimate - beside
    assert command.main(["--dry-run", "--visit", "1", "--carried", "no/such/folder"]) == 1
    said = capsys.readouterr().out
    assert "nothing is carried there" in said
    assert "--pack" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--visit", "1"], "expected OUT"),
        (["--visit", "1", "out", "env"], "a visit has its own stages"),
        (["--visit", "3", "out"], "invalid choice"),
        (["--visit", "2", "--after", "nowhere.tar.gz", "out"], "there is no such tar"),
        ([], "expected OUT"),
    ],
)
def test_command_lines_that_cannot_be_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---- after an earlier visit


def report(status: str, **data: Any) -> dict[str, Any]:
    return {"status": status, "data": data}


def write(folder: Path, **reports: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, one in reports.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(one))
    return folder


def test_the_second_visit_begins_with_what_the_first_left(tmp_path: Path) -> None:
    cases = report(
        "failed",
        planned=["cuda a", "cuda b", "cuda c", "cuda d"],
        rows=[{"job": "cuda a"}, {"job": "cuda b", "error": "wrong"}, {"job": "cuda c"}],
    )
    layout = report(
        "failed",
        planned=["mma", "bulk"],
        probes=[{"name": "mma", "status": "failed"}, {"name": "bulk", "status": "ok"}],
    )
    ours = [{"contender": "cuda", "error": "wrong result"}, {"contender": "sdpa_flash"}]
    theirs = [{"contender": "cuda"}, {"contender": "flash_attn_3", "error": "ImportError"}]
    bench = report(
        "failed",
        planned=["cuda x", "cuda y"],
        rows=[{"job": "cuda x", "rows": ours}, {"job": "cuda y", "rows": theirs}],
    )
    folder = write(tmp_path / "1", cases=cases, layout=layout, bench_cuda=bench)
    tasks = {task.step.stage: task for task in prepare(2, folder).tasks}
    order = list(tasks)
    assert order[:5] == ["layout", "cases", "bench-cuda", "sanitizer", "cases-triton"]
    assert tasks["layout"].only == {"mma"}
    assert tasks["cases"].only == {"cuda b", "cuda d"}
    assert tasks["bench-cuda"].only == {"cuda x"}
    assert tasks["sanitizer"].only == {"cuda"}, "the backend that failed"
    assert tasks["cases-triton"].only is None, "never begun: the whole stage"
    whole = next(step for step in VISITS[2].steps if step.stage == "cases")
    assert plan.START_SECONDS < tasks["cases"].estimate < whole.estimate


def test_what_the_first_visit_ended_is_not_asked_again(tmp_path: Path) -> None:
    done = report("ok", planned=["a"], rows=[{"job": "a"}])
    stages = ("layout", "cases", "bench_cuda", "cases_triton", "ahead_triton", "bench_triton")
    folder = write(tmp_path / "1", **dict.fromkeys(stages, done))
    left = [task.step.stage for task in prepare(2, folder).tasks]
    assert left == ["train", "stress", "bench-decode", "launch", "profile"]
    nothing = prepare(2, None)
    assert not any(task.step.again or task.step.if_failed for task in nothing.tasks)


def test_a_stage_that_was_killed_leaves_what_it_had_not_come_to() -> None:
    killed = report("failed", planned=["a", "b", "c"], rows=[{"job": "a"}])
    assert earlier.unfinished(killed).jobs == {"b", "c"}
    assert earlier.unfinished(report("failed")) == earlier.Unfinished(1, None)
    assert earlier.unfinished(report("ok")).share == 0
