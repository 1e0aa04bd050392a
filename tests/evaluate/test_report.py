"""`drope_kernels.evaluate.report`: the files of a sweep, written whole or not at all."""

from __future__ import annotations

import json
import re

import pytest

from drope_kernels.evaluate import MeanLoss, PositionBucket, Proportion, SweepRow

pytest.importorskip("matplotlib")

from drope_kernels.evaluate import report as report_module
from drope_kernels.evaluate.report import Report, write_report

LENGTHS = (32, 64, 128)


def row_named(name):
    score = {length: Proportion(2, 3) for length in LENGTHS}
    losses = {length: MeanLoss((0.5, 1.5), 60) for length in LENGTHS}
    buckets = [PositionBucket(1, 8, MeanLoss((1.0,), 7)), PositionBucket(8, 128, losses[32])]
    return SweepRow(name, {"1 needle": score, "4 needles": score}, losses, losses, buckets)


def report_of(rows):
    return Report(
        title="A test",
        train_length=32,
        rows=rows,
        findings=["found"],
        caveats=["but"],
        settings={"seed": 0, "machine_name": "never"},
        stage_seconds={"train": 1.25},
    )


@pytest.fixture
def rows() -> list[SweepRow]:
    return [row_named("first"), row_named("second | with a bar")]


def test_report_files(rows, tmp_path):
    out = tmp_path / "report"
    write_report(report_of(rows), out)
    write_report(report_of(rows), out)  # an earlier report is replaced
    assert sorted(path.name for path in out.iterdir()) == [
        "loss_by_position.png",
        "report.json",
        "report.md",
        "retrieval.png",
        "text_loss.png",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    for plot in out.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG\r\n")
    found = json.loads((out / "report.json").read_text())
    assert found["lengths"] == [32, 64, 128]
    cell = found["rows"][0]["retrieval"]["4 needles"]["128"]
    assert cell["cases"] == 3
    assert cell["wilson95"][0] <= cell["right"] / 3 <= cell["wilson95"][1]
    assert found["rows"][1]["text_loss"]["64"]["mean"] == pytest.approx(1.0, abs=1e-4)
    markdown = (out / "report.md").read_text()
    for text in ("- found", "- but", "| first |", "## Text loss by position", "(128)", "1.000"):
        assert text in markdown
    widths: dict[str, set[int]] = {"| first": set(), "| second": set()}
    for line in markdown.splitlines():
        for start, found_widths in widths.items():
            if line.startswith(start):
                found_widths.add(len(re.split(r"(?<!\\)\|", line)))
    assert widths["| first"] == widths["| second"]  # a bar in a name is no column


def test_a_refused_or_failed_report_leaves_the_old_one_whole(rows, tmp_path, monkeypatch):
    out = tmp_path / "report"
    write_report(report_of(rows), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"with other files \(notes\.txt\)"):
        write_report(report_of(rows), out)
    (out / "notes.txt").unlink()

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_module, "write_plots", broken)
    with pytest.raises(KeyboardInterrupt):
        write_report(report_of(rows), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
