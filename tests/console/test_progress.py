"""Bars on a terminal, lines elsewhere, and the estimate of what is left."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")
from rich.console import Console

from drope_kernels.console import progress as progress_module
from drope_kernels.console.progress import Progress, clock


class Time:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(progress_module, "time", time)
    return time


def console(*, terminal: bool, encoding: str = "utf-8", width: int = 80) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    # Without colours the text of a row is in one piece.
    return Console(file=file, force_terminal=terminal, color_system=None, width=width)


def shown(where: Console) -> str:
    return where.file.buffer.getvalue().decode(where.encoding)  # type: ignore[attr-defined]


def test_lines_where_there_is_no_terminal(time: Time) -> None:
    where = console(terminal=False, width=20)
    with Progress(where) as progress:
        bar = progress.bar()
        bar.say("loading [a model] of a long name")
        bar.begin(200)
        time.now += 3
        bar.advance("row one", 50)
        bar.advance("row one", 50)
        time.now += 1
        bar.advance("row two", 60)
        progress.write("said anyway")
    assert shown(where) == (
        "loading [a model] of a long name ...\n"
        "row one ... 25 %, about 9 s left\n"
        "row two ... 80 %, about 1 s left\n"
        "said anyway\n"
    )


def test_a_bar_on_a_terminal(time: Time) -> None:
    where = console(terminal=True)
    with Progress(where, indent=8) as progress:
        bar = progress.bar("train", total=40, done=20)
        bar.note = "loss 1.5"
        time.now += 6
        bar.add(10)
        progress.line("not here")
        progress.write("but this")
    assert "train:    75% " + 27 * "━" + 9 * "─" + " 30/40 [00:06<00:06, loss 1.5]" in shown(where)
    assert "but this" in shown(where)
    assert "not here" not in shown(where)


def test_a_bar_fits_its_terminal(time: Time) -> None:
    where = console(terminal=True, encoding="ascii", width=30)
    with Progress(where) as progress:
        bar = progress.bar("a description", total=4)
        bar.add(2)
        bar.note = "a long note"
    assert "a description:  50% ####----" in shown(where)
    assert "note" not in shown(where)


def test_work_of_unknown_size_has_no_estimate(time: Time) -> None:
    bar = Progress(console(terminal=False)).bar("loading")
    bar.add(5)
    assert bar.share == 0.0
    assert bar.left() == 0.0


def test_the_clock_of_a_bar_ends_with_its_work(time: Time) -> None:
    bar = Progress(console(terminal=False)).bar("train", total=2)
    time.now += 5
    bar.add(2)
    time.now += 100
    assert bar.elapsed() == 5
    assert bar.left() == 0


def test_clock() -> None:
    assert [clock(s) for s in (0.4, 59.6, 3599, 3600)] == ["00:00", "01:00", "59:59", "1:00:00"]
