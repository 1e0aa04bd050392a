"""Options of `pytest bench/`, and what it leaves behind: a table, JSON and plots."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench import machine
from bench.machine import ROOT

from . import gpu_results
from .cases import BenchCase
from .gpu_report import section
from .gpu_results import GpuResults
from .report import plot, print_table, save, write_markdown
from .timing import ReplayClock, Samples

ROWS = pytest.StashKey[list[dict[str, object]]]()
GPU_ROWS = pytest.StashKey[list[dict[str, object]]]()
CEILINGS = pytest.StashKey[dict[str, object] | None]()
GPU_ASKED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-out",
        default="bench-report",
        help="folder for the JSON and the plots (default: bench-report)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[GPU_ROWS] = []
    config.stash[CEILINGS] = None
    config.stash[GPU_ASKED] = False


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
    directory = Path(config.getoption("--bench-out"))
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("drope_kernels benchmark")
        print_table(rows, terminalreporter.write)
        for path in [
            save(rows, directory),
            write_markdown(rows, directory),
            *plot(rows, directory),
        ]:
            terminalreporter.write_line(f"wrote {path}")
    if config.stash[GPU_ASKED]:
        terminalreporter.section("drope_kernels on the GPU")
        results = gpu_results_here(config)
        terminalreporter.write_line(section(results))
        if results.rows:
            terminalreporter.write_line(f"wrote {gpu_results.save(results, directory)}")


def gpu_results_here(config: pytest.Config) -> GpuResults:
    """What this session measured; NOTHING without a GPU."""
    rows = config.stash[GPU_ROWS]
    if not rows:
        return gpu_results.NOTHING
    about = {
        **machine.description(),
        "versions": machine.versions(),
        "commit": machine.commit(ROOT),
        "date": time.strftime("%Y-%m-%d"),
    }
    return GpuResults(about, config.stash[CEILINGS], rows)
