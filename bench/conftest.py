"""Options of `pytest bench/`, and what it leaves behind: a table, JSON and plots."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import BenchCase
from .report import plot, print_table, save, write_markdown
from .timing import ReplayClock, Samples

ROWS = pytest.StashKey[list[dict[str, object]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-out",
        default="bench-report",
        help="folder for the JSON and the plots (default: bench-report)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def replay(benchmark, request):
    """Give one contender's interleaved samples to pytest-benchmark and to the report."""

    def record(row: dict[str, object], samples: Samples) -> None:
        clock = ReplayClock(samples)
        benchmark.group = row["case"]
        benchmark._timer = clock.now  # the rounds were timed interleaved; they are replayed here
        benchmark.extra_info.update(row)
        benchmark.pedantic(clock.advance, rounds=len(samples.seconds), iterations=1)
        request.config.stash[ROWS].append(row)

    return record


def case_ids(value: object) -> str | None:
    return value.name if isinstance(value, BenchCase) else None


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("drope_kernels benchmark")
    print_table(rows, terminalreporter.write)
    directory = Path(config.getoption("--bench-out"))
    written = [save(rows, directory), write_markdown(rows, directory), *plot(rows, directory)]
    for path in written:
        terminalreporter.write_line(f"wrote {path}")
