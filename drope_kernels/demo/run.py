"""The whole demo: text, lanes, report."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

import drope_kernels
from drope_kernels import available_backends, build_info
from drope_kernels.call.dispatch import check_name
from drope_kernels.console.progress import Progress
from drope_kernels.console.signals import sigterm_raises
from drope_kernels.demo.config import DemoConfig
from drope_kernels.demo.corpus import Corpus, load_corpus
from drope_kernels.demo.findings import caveats, findings
from drope_kernels.demo.lanes import Outcome, run_lanes
from drope_kernels.demo.plan import lanes, row_order
from drope_kernels.demo.progress import INDENT, StageBars
from drope_kernels.evaluate.report import Report, check_report_folder, write_report
from drope_kernels.evaluate.terminal import print_report

TITLE = "DroPE on a small decoder: pretrain with RoPE, drop it, recalibrate, measure"


def run_demo(config: DemoConfig, out: Path, num_lanes: int, command: str) -> Report:
    """Runs everything and leaves the report in `out`, which an interrupt does not touch.

    num_lanes: 1 or 2 processes of one thread each. Raises ValueError for an `out` that holds
    something else, KeyboardInterrupt or SystemExit when interrupted.
    """
    check_demo(config, out, num_lanes)
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # a log: tables need not fold
    start = time.perf_counter()
    planned = lanes(config)
    if num_lanes == 1:
        planned = [[stage for lane in planned for stage in lane]]
    with (
        sigterm_raises(SystemExit(128 + signal.SIGTERM)),  # workers stopped, files removed
        tempfile.TemporaryDirectory(prefix="drope-demo-") as workplace,
    ):
        corpus = load_corpus()
        text_seconds = time.perf_counter() - start
        _print_start(console, config, corpus, num_lanes)
        with Progress(console, INDENT) as progress:
            bars = StageBars([stage for lane in planned for stage in lane], progress)
            outcome = run_lanes(planned, config, corpus, Path(workplace), bars.show)
        outcome.seconds = {"read and tokenize the text": text_seconds, **outcome.seconds}
        outcome.seconds["total"] = time.perf_counter() - start
        report = _report(config, corpus, outcome, num_lanes, command)
        write_report(report, out)
    print_report(report, console)
    console.print(f"{outcome.seconds['total']:.0f} s; everything is in {out}/", highlight=False)
    return report


def check_demo(config: DemoConfig, out: Path, num_lanes: int) -> None:
    """ValueError for what would only fail later."""
    check_report_folder(out)
    if config.backend != "auto":
        check_name(config.backend)
    if num_lanes not in (1, 2):
        raise ValueError(f"processes: expected 1 or 2, got {num_lanes}")


def _report(
    config: DemoConfig, corpus: Corpus, outcome: Outcome, num_lanes: int, command: str
) -> Report:
    rows = [outcome.rows[name] for name in row_order(config)]
    return Report(
        title=TITLE,
        train_length=config.context,
        rows=rows,
        findings=findings(rows, config),
        caveats=caveats(config, outcome.fits),
        settings=_settings(config, corpus, num_lanes, command),
        stage_seconds=outcome.seconds,
        extra={"temperature_fits": outcome.fits},
    )


def _settings(config: DemoConfig, corpus: Corpus, num_lanes: int, command: str) -> dict[str, Any]:
    build = build_info()
    return {
        "command": command,
        "drope_kernels": drope_kernels.__version__,
        "build": f"{build['commit']}, {build['compiler']}, {build['build_type']}",
        "backends": available_backends(),
        "transformers": transformers.__version__,
        "processes": num_lanes,
        "train_tokens": len(corpus.train),
        "held_out_tokens": len(corpus.held_out),
        **config.settings(),
    }


def _print_start(console: Console, config: DemoConfig, corpus: Corpus, num_lanes: int) -> None:
    console.print(
        f"{len(corpus.train):,} training tokens, {len(corpus.held_out):,} held out; C = "
        f"{config.context}; {config.pretrain_steps} + {config.recalibration_steps} steps; "
        f"backends {', '.join(available_backends())}; {num_lanes} process(es)",
        highlight=False,
    )


def default_lanes() -> int:
    return min(2, len(os.sched_getaffinity(0)))
